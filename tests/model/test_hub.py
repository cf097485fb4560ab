"""Models named as on a hub: found in the local cache by every command, at the revision that is asked for."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from moe_prism import cli
from moe_prism.artefact.open import open_model
from moe_prism.checkpoint import source_facts
from moe_prism.errors import UsageError
from moe_prism.model import load_to_run, resolve
from moe_prism.model.hub import at_revision, is_hub_name
from moe_prism.model.place import check_device, placed, placement, recorded
from moe_prism.options.place import Placement
from moe_prism.options.skip import SkipOptions

NAME = "some-lab/tiny-moe"
MAIN, OLD = "a" * 40, "b" * 40
SMALL = ("--tokens", "256", "--length", "32")


def put_in_cache(cache, source, revision, names=("main",)):
    """The folder as the hub's library keeps it: blobs, and a snapshot of links to them."""
    home = cache / "models--some-lab--tiny-moe"
    snapshot = home / "snapshots" / revision
    for folder in (home / "blobs", snapshot, home / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        blob = home / "blobs" / f"{revision[:4]}-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    for name in names:
        (home / "refs" / name).write_text(revision)
    return snapshot


@pytest.fixture
def cache(tmp_path, tiny_source, monkeypatch):
    """A cache with one model at two revisions; the older one has another context length."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put_in_cache(tmp_path / "hub", tiny_source, MAIN)
    old = shutil.copytree(tiny_source, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    put_in_cache(tmp_path / "hub", old, OLD, ("v1",))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_name_is_its_snapshot(cache):
    assert resolve(NAME).name == MAIN and source_facts(resolve(NAME))["name"] == NAME
    with at_revision("v1"):
        assert resolve(NAME).name == OLD
    with at_revision(OLD):
        assert resolve(NAME).name == OLD
    assert resolve(NAME).name == MAIN and open_model(NAME).name == NAME


def test_what_is_no_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-lab").mkdir()
    (tmp_path / NAME).mkdir()
    for text in (NAME, "nano", "./a/b", "/a/b", "~/a", "a/b/c", "a b/c", "../a"):
        assert not is_hub_name(text)
    assert is_hub_name("a/b") and is_hub_name("a/b/c.gguf") and is_hub_name("Qwen/Qwen3-30B-A3B")


@pytest.mark.parametrize("name", ["some-lab/other", "some-lab/other/file.gguf"])
def test_a_name_that_is_not_in_the_cache_is_refused_in_one_line(cache, name):
    with pytest.raises(UsageError, match=f"'{name}' is no folder here and not in the hub's cache"):
        resolve(name)


def test_a_repository_of_ggufs_says_how_to_name_one(cache, tmp_path):
    (cache / "models--some-lab--tiny-moe/snapshots" / MAIN / "config.json").unlink()
    with pytest.raises(UsageError, match=r"OWNER/MODEL/FILE\.gguf"):
        resolve(NAME)


@pytest.fixture
def run(cache, capsys):
    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("commands", "written"),
    [
        ([("inspect", NAME), ("refactor", NAME, "-o", "out", "--profile-tokens", 0)], ("out/prism.json", "out/README.md")),
        ([("prune", NAME, "-o", "out", "--criterion", "soft-count", "--keep", 0.5)], ("out/prism.json", "out/README.md")),
        ([("calibrate", NAME, "-o", "out")], ("out/prism.json",)),
        ([("frontier", NAME, "-o", "out", "--methods", "uniform")], ("out/frontier.json",)),
        ([("trace", NAME, "-o", "t.npz", "--prompt", 8), ("generate", NAME, "--prompt", "import", "--max-tokens", 2)], ()),
        ([("skip", NAME, "-o", "plan.json", "--mean", 1, "--method", "uniform")], ("plan.json",)),
    ],
    ids=lambda value: value[0][0] if isinstance(value, list) else "",
)
def test_every_command_takes_a_name(run, text_file, tmp_path, commands, written):
    """And what it writes names the model, not the place in the cache."""
    for command in commands:
        code, _, err = run(*command, *(() if command[0] in ("inspect", "generate") else ("--text", text_file, *SMALL)))
        assert code == 0, (command, err)
    for name in written:
        text = (tmp_path / name).read_text()
        assert NAME in text and MAIN not in text


def test_a_revision_reaches_the_command(run):
    code, out, err = run("inspect", NAME, "--revision", "v1", "--json")
    assert code == 0 and OLD in json.loads(out)["model"], err
    assert run("inspect", NAME, "--revision", "v2")[0] == 2
    code, _, err = run("inspect", "nano", "--revision", "v1")
    assert code == 2 and "--revision belongs to a model on a hub" in err and err.count("\n") == 1


def test_nothing_is_written_into_the_cache(run, elastic_tiny, cache):
    put_in_cache(cache, elastic_tiny, "c" * 40, ("elastic",))
    code, _, err = run("frontier", NAME, "--revision", "elastic", *SMALL)
    assert code == 2 and "--out" in err and err.count("\n") == 1


def test_placement_is_that_of_the_block_and_on_record(tiny_source):
    assert placement() == Placement() and "placement" not in recorded(SkipOptions())
    with placed(Placement(dtype="bfloat16", device="cpu")):
        model = load_to_run(tiny_source)
        assert model.dtype == torch.bfloat16 and recorded(SkipOptions())["placement"] == {"dtype": "bfloat16", "device": "cpu"}
    assert load_to_run(tiny_source).dtype == torch.float32 and placement() == Placement()
    with placed(Placement(dtype="auto")):
        assert load_to_run(tiny_source).dtype == torch.float32  # as stored


def test_a_model_is_spread_where_accelerate_is_installed(tiny_source, run, elastic_tiny, monkeypatch):
    pytest.importorskip("accelerate")
    with placed(Placement(device_map="auto")):
        assert {p.device.type for p in load_to_run(tiny_source).parameters()} == {"cpu"}
    words = ("generate", elastic_tiny, "--prompt", "import", "--max-tokens", 2, "--device-map", "auto")
    assert run(*words, "--dtype", "bf16")[0] == 0
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code, _, err = run(*words)
    assert code == 2 and "pip install 'moe-prism[accelerate]'" in err and err.count("\n") == 1


def test_a_gpu_is_where_it_goes_if_asked(monkeypatch, tiny_source):
    moved = []
    monkeypatch.setattr("moe_prism.model.load.load_model", lambda *a: SimpleNamespace(to=moved.append))
    monkeypatch.setattr("moe_prism.model.place.check_device", torch.device)
    with placed(Placement(device="cuda:1")):
        load_to_run(tiny_source)
    assert moved == ["cuda:1"]


@pytest.mark.parametrize("name", ["cuda:7", "tpu", "cuda:x", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UsageError, match=f"--device '{name}'"):
        check_device(name)


def test_flags_that_exclude_each_other_are_refused(run, elastic_tiny, tiny_source):
    generate = ("generate", elastic_tiny, "--prompt", "import", "--max-tokens", 2)
    for given, said in (
        (("--device", "cpu", "--device-map", "auto"), "both say where"),
        (("--device", "cuda:9"), "is not on this machine"),
        (("--dtype", "bf16", "--expert-memory", "1MB"), "--expert-memory computes on the CPU in float32"),
    ):
        code, _, err = run(*generate, *given)
        assert code == 2 and said in err and err.count("\n") == 1, err
