"""Whatever is wrong with the input: one line on stderr with the cause and the next step, exit code 2 or 4, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prism import cli
from tests.tiers import by_night
from tests.tiny_sources import digests, save_tiny

SMALL = ("--tokens", "256", "--length", "32")


def first_shard(folder):
    return sorted(folder.glob("model*.safetensors"))[0]


def corrupt(folder):
    data = bytearray(first_shard(folder).read_bytes())
    data[8:24] = b"this is no JSON!"
    first_shard(folder).write_bytes(bytes(data))


def truncated(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


def missing_shard(folder):
    first_shard(folder).unlink()


def not_a_number(folder):
    shard = sorted(folder.glob("model*.safetensors"))[-1]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, shard, {"format": "pt"})


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def unknown_family(folder):
    (folder / "config.json").write_text('{"model_type": "nonsense"}')


def pickled(folder):
    for shard in folder.glob("model*"):
        shard.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


DAMAGES = [
    (corrupt, 4, "safetensors"),
    (truncated, 4, "safetensors"),
    (missing_shard, 4, "safetensors"),
    (not_a_number, 4, "nan"),
    (no_config, 2, "config.json"),
    (broken_config, 4, "not JSON"),
    (unknown_family, 2, "nonsense"),
    (pickled, 2, "pickle"),
]


FIRST = ("calibration text: ", "evaluation text: ", "warning: ")
"""What a long command says before it looks at the rest."""


@pytest.fixture
def fails(capsys, tmp_path):
    """fails(code, *arguments): run, check the one line and the empty folder, return the line."""

    def call(code, *arguments):
        before = sorted(p.name for p in tmp_path.iterdir())
        capsys.readouterr()
        found = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith(FIRST))
        assert found == code, err
        assert err.startswith("moe-prism: error: ") and err.count("\n") == 1, err
        assert "; " in err, "no next step"
        assert "Traceback" not in err
        if "--json" in arguments:
            assert json.loads(out)["exit_code"] == code and out.count("\n") == 1
        else:
            assert out == ""
        assert sorted(p.name for p in tmp_path.iterdir()) == before, "something was written"
        return err

    return call


@pytest.mark.parametrize("command", ["calibrate", "refactor"])
@pytest.mark.parametrize(("damage", "code", "names"), DAMAGES, ids=lambda v: getattr(v, "__name__", None))
def test_damaged_source(fails, tiny_source, text_file, tmp_path, command, damage, code, names):
    shutil.copytree(tiny_source, tmp_path / "source")
    damage(tmp_path / "source")
    line = fails(code, command, tmp_path / "source", "-o", tmp_path / "out", "--text", text_file, *SMALL)
    assert names in line


@pytest.mark.parametrize("command", ["calibrate", "refactor"])
def test_bad_paths_and_text(fails, tiny_source, text_file, tmp_path, command):
    out = ("-o", tmp_path / "out")
    assert "does not exist" in fails(2, command, tmp_path / "missing", *out)
    assert "not a model folder" in fails(2, command, text_file, *out)
    assert "does not exist" in fails(2, command, tiny_source, *out, "--text", tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    assert "is empty" in fails(2, command, tiny_source, *out, "--text", tmp_path / "empty.txt", "--json")
    (tmp_path / "short.txt").write_text("x = 1\n")
    assert "less than one window" in fails(2, command, tiny_source, *out, "--text", tmp_path / "short.txt")


@pytest.mark.parametrize("command", ["calibrate", "refactor", "inspect"])
def test_a_model_without_any_mlp(fails, text_file, tmp_path, command):
    save_tiny("mamba", tmp_path / "mamba")
    more = () if command == "inspect" else ("-o", tmp_path / "out", "--text", text_file, *SMALL)
    assert "no MoE layer and no dense MLP" in fails(2, command, tmp_path / "mamba", *more)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--n-sub", "3"), "16 neurons"),
        (("--n-sub", "1"), "--n-sub 1"),
        (("--solver", "best"), "alt, nested, sa, greedy, contiguous, random"),
        (("--solver", "greedi"), "did you mean 'greedy'?"),
        (("--gate-choice", "best"), "energy, centrality, centrality-expert"),
        (("--extra-scorers", "ridge,best"), "unknown scorer 'best'"),
        (("--compensate", "luck"), "none, mean, scale, low-rank"),
        (("--compensate", "low-rank", "--rank", "0"), "--rank"),
        (("--compensate", "low-rank", "--rank", "99"), "hidden size"),
        (("--gates", "99"), "--gates 99"),
        (("--dropped", "4"), "--dropped 4"),
        (("--tokens", "0"), "--tokens 0"),
        (("--tokens", "many"), "many"),
        (("--reservoir", "1"), "--reservoir 1"),
        (("--seed", "-1"), "--seed -1"),
        (("--calibration", "nowhere"), "nowhere"),
        (("--unknown", "1"), "--unknown"),
    ],
)
def test_bad_options_of_refactor(fails, tiny_source, text_file, tmp_path, options, names):
    arguments = ("refactor", tiny_source, "-o", tmp_path / "out", "--text", text_file, *options)
    assert names in fails(2, *arguments)
    if options[0] != "--calibration":
        assert names in fails(2, *arguments, "--dry-run")


def test_f11_too_little_memory_for_statistics(fails, text_file, tmp_path):
    save_tiny("olmoe", tmp_path / "source", hidden_size=64, num_experts=64)
    arguments = (tmp_path / "source", "-o", tmp_path / "out", "--text", text_file, *SMALL, "--memory-mib", "1")
    assert "--memory-mib" in fails(3, "calibrate", *arguments)
    assert "--memory-mib" in fails(3, "refactor", *arguments)


def test_an_existing_output_is_kept(fails, tiny_source, text_file, elastic_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for command in ("calibrate", "refactor"):
        arguments = (command, tiny_source, "-o", tmp_path / "out", "--text", text_file, *SMALL)
        assert "--force" in fails(2, *arguments)
        assert "will not be replaced" in fails(2, *arguments, "--force")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["calibrate", "refactor"])
@pytest.mark.parametrize("where", ["source", "source/inside", "."])
def test_the_source_is_never_replaced(fails, tiny_source, text_file, tmp_path, monkeypatch, command, where):
    shutil.copytree(tiny_source, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    assert "overlap" in fails(2, command, "source", "-o", where, "--force", "--text", text_file, *SMALL)
    assert digests(tmp_path / "source") == digests(tiny_source)


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "nan", "half"])
def test_bad_budgets(fails, elastic_tiny, budget):
    assert "budget" in fails(2, "generate", elastic_tiny, "--prompt", "x", "--budget", budget)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--rule", "best"), "product"),
        (("--prompt", ""), "prompt is empty"),
        (("--max-tokens", "0"), "--max-tokens 0"),
        (("--max-tokens", "100000"), "context limit"),
        (("--temperature", "-1"), "temperature -1"),
        (("--kv-entries", "0"), "--kv-entries 0"),
        (("--decode", "self-drafts"), "did you mean 'self-draft'?"),
        (("--decode", "self-draft:2"), "outside (0, 1]"),
        (("--decode", "des"), "--verifier"),
        (("--decode", "des", "--verifier", "nobody.py:f"), "there is no file nobody.py"),
        (("--decode", "scmoe", "--kv-entries", "8"), "bounded cache"),
        (("--decode", "scmoe", "--budget", "0.5"), "control 'none'"),
    ],
)
def test_bad_options_of_generate(fails, elastic_tiny, options, names):
    prompt = () if "--prompt" in options else ("--prompt", "x")
    assert names in fails(2, "generate", elastic_tiny, *prompt, *options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--compare", "best"), "product"),
        (("--compare", ""), "--compare is empty"),
        (("--text", "missing.txt"), "does not exist"),
        (("--tokens", "10"), "--tokens 10"),
        (("--time-batch", "8"), "--time-batch belongs to --time"),
        (("--time", "--time-batch", "0"), "--time-batch 0"),
    ],
)
def test_bad_options_of_frontier(fails, elastic_tiny, tmp_path, options, names):
    assert names in fails(2, "frontier", elastic_tiny, "-o", tmp_path / "out", *options)


@pytest.mark.parametrize("command", [("frontier",), ("verify",)])
def test_a_folder_that_is_not_elastic(fails, tiny_source, tmp_path, command):
    assert "no prism.json" in fails(2, command[0], tiny_source, *command[1:])
    assert "no prism.json" in fails(2, command[0], tmp_path / "missing", *command[1:])


@pytest.mark.parametrize(
    ("command", "out"),
    [
        (("skip", "--mean", "1"), "missing/plan.json"),
        (("trace",), "missing/trace.npz"),
        (("inspect", "--routing", "--trace", "nano", "--report"), "missing/misses.html"),
        (("forecast",), "file/forecast"),
        (("frontier",), "file/report"),
    ],
)
def test_an_unwritable_output_is_told_before_the_work(fails, elastic_tiny, tmp_path, monkeypatch, command, out):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # nothing is loaded
    option = () if command[-1] == "--report" else ("-o",)
    assert "cannot write" in fails(2, command[0], elastic_tiny, *command[1:], *option, tmp_path / out)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--methods", "threshold,prune:best"), "unknown prune criterion 'best'"),
        (("--points", "missing.json"), "missing.json"),
        (("--points", "4"), "say --per-method 4"),
    ],
)
def test_wrong_names_are_told_before_anything_is_fitted(fails, elastic_tiny, tmp_path, monkeypatch, options, names):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert names in fails(2, "frontier", elastic_tiny, "-o", tmp_path / "out", *options)


@pytest.mark.parametrize("method", ["prune", "threshold", "nonsense"])
def test_a_method_that_makes_no_skip_plan(fails, tiny_source, tmp_path, method):
    line = fails(2, "skip", tiny_source, "--method", method, "--mean", "1", "-o", tmp_path / "plan.json")
    assert f"'{method}'" in line and "choose one of: uniform" in line


@pytest.mark.parametrize("mean", by_night(["0", "9", "nan", "inf"], "9"))
def test_bad_means_of_skip(fails, tiny_source, text_file, tmp_path, mean):
    for method in ("sensitivity", "naee", "pattern-skip:2-1-1-1"):
        options = ("--method", method, "--mean", mean, "-o", tmp_path / "plan.json", "--text", text_file, *SMALL)
        assert "outside 1.." in fails(2, "skip", tiny_source, *options)


def test_a_skip_plan_of_more_experts_than_a_token_has(fails, elastic_tiny, text_file, tmp_path):
    (tmp_path / "plan.json").write_text('{"0": 2, "1": 9}')
    line = "layer 1 of the routing stage keeps 9 experts, a token of the model has 2; give 1 to 2"
    assert line in fails(2, "generate", elastic_tiny, "--prompt", "x", "--point", tmp_path / "plan.json")
    options = ("-o", tmp_path / "out", "--points", tmp_path / "plan.json", "--text", text_file, *SMALL)
    assert line in fails(2, "frontier", elastic_tiny, *options)


def test_a_trace_of_another_model(fails, tiny_source):
    assert "6 layers of 32 experts" in fails(2, "inspect", tiny_source, "--routing", "--trace", "nano")


def test_a_damaged_side_file_is_no_crash(fails, elastic_tiny, tmp_path):
    shutil.copytree(elastic_tiny, tmp_path / "elastic")
    side = tmp_path / "elastic" / "prism.safetensors"
    side.write_bytes(side.read_bytes()[:40])
    assert "prism.safetensors" in fails(4, "generate", tmp_path / "elastic", "--prompt", "x")
    side.unlink()
    assert "prism.safetensors" in fails(4, "generate", tmp_path / "elastic", "--prompt", "x")


@pytest.mark.parametrize("arguments", [("ls", "nonsense"), ("nonsense",), ("verify",), ("refactor", "nano")])
def test_bad_commands(fails, arguments):
    fails(2, *arguments)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--budget", "0"), "budget 0 is outside (0, 1]"),
        (("--budget", "nan"), "budget nan"),
        (("--rule", "treshold"), "did you mean 'threshold'?"),
        (("--temperature", "nan"), "temperature nan"),
        (("--max-tokens", "0"), "--max-tokens 0"),
        (("--seed", "-1"), "seed -1"),
        (("--seed", str(10**30)), "seed 1000"),
        (("--expert-memory", "5MB", "--budget", "0.5", "--miss-floor", "0.8"), "not below --budget 0.5"),
        (("--bugdet", "0.5"), "see `moe-prism generate --help`"),
    ],
)
def test_bad_options_of_generate_are_told_before_the_model_is_loaded(fails, elastic_tiny, monkeypatch, options, names):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert names in fails(2, "generate", elastic_tiny, "--prompt", "x", *options)


def test_names_of_methods_and_compensators_are_guessed(fails, elastic_tiny, tiny_source, tmp_path):
    assert "did you mean 'threshold'?" in fails(2, "frontier", elastic_tiny, "--compare", "treshold")
    assert "did you mean 'mean'?" in fails(2, "refactor", tiny_source, "-o", tmp_path / "out", "--compensate", "maen")
    assert "did you mean 'sensitivity'?" in fails(2, "skip", tiny_source, "-o", tmp_path / "p.json", "--method", "sensitivty")


def test_a_file_that_is_no_trace(fails, tiny_source, text_file):
    line = fails(4, "inspect", tiny_source, "--routing", "--trace", text_file)
    assert "is no .npz file" in line and "pickle" not in line


@pytest.mark.parametrize(
    ("name", "code", "names"),
    [("model", 4, "header describes"), ("prism", 4, "prism.safetensors"), ("tokenizer", 2, "no tokenizer.json")],
)
def test_a_damaged_elastic_folder_is_not_generated_from(fails, elastic_tiny, tmp_path, name, code, names):
    shutil.copytree(elastic_tiny, tmp_path / "elastic")
    file = next((tmp_path / "elastic").glob(f"{name}*.safetensors" if name != "tokenizer" else "tokenizer.json"))
    file.unlink() if name == "tokenizer" else file.write_bytes(file.read_bytes()[:-64])
    assert names in fails(code, "generate", tmp_path / "elastic", "--prompt", "x", "--max-tokens", "1")


def test_f04_a_disk_that_is_too_small_is_the_disk_of_the_output(fails, tiny_source, tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(1, 1, 0)

    monkeypatch.setattr("moe_prism.jobs.resources.shutil.disk_usage", usage)
    line = fails(3, "refactor", tiny_source, "-o", tmp_path / "deep" / "out", "--dry-run", "--json")
    assert "MiB of disk" in line and asked == [tmp_path]
    for command in (
        "refactor",
        "calibrate",
        "prune",
        "compress",
    ):  # F04: not the dry run alone, and before anything is calibrated
        source = "nano" if command == "compress" else tiny_source  # whose 16 inputs are no groups
        assert "MiB of disk" in fails(3, command, source, "-o", tmp_path / "deep" / "out")
        assert not (tmp_path / "deep").exists()
