"""`moe-prism forecast`: from a config alone, from a model, and every mistake in one line."""

from __future__ import annotations

import json
import shutil

import pytest

from moe_prism import cli
from moe_prism.cli.flags import quantity
from moe_prism.errors import UsageError
from tests.tiny_sources import save_tiny

MACHINE = ("--bandwidth", "3350GB/s", "--peak", "989TFLOPS", "--fixed", "4ms")
SMALL = ("--concurrency", "1,2", "--tokens", "512", "--context", "8", "--seconds", "1")
OLMOE = {
    "model_type": "olmoe", "dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
    "vocab_size": 50304, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main(["forecast", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def config_only(tmp_path):
    folder = tmp_path / "OLMoE"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OLMOE))
    return folder


@pytest.mark.parametrize("file", [False, True])
def test_from_a_config_without_weights(run, config_only, tmp_path, file):
    source = config_only / "config.json" if file else config_only
    code, out, err = run(source, *MACHINE, "--concurrency", "1,16,256", "-o", tmp_path / "report", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["model"] == "OLMoE" and found["machines"]["stock"]["bandwidth"] == pytest.approx(3.35e12)
    shape = found["shape"]
    assert len(shape["layers"]) == 16 and shape["layers"][0] == {"experts": 64, "chosen": 8, "weights": 3 * 2048 * 1024}
    head, attention, norms, router = 50304 * 2048, 16 * 4 * 2048**2, 2048 * (16 * 4 + 1), 16 * 64 * 2048
    assert shape["rest"] == head + attention + norms + router and shape["bytes_per_weight"] == 2
    assert (shape["cached"], shape["attend"]) == (2 * 16 * 2048, 4 * 16 * 2048)
    first = found["rows"][0]
    read = 2 * (16 * 8 * 3 * 2048 * 1024 + shape["rest"] + 256 * shape["cached"])
    assert (first["name"], first["concurrency"]) == ("top-8", 1) and first["seconds"] == pytest.approx(4e-3 + read / 3.35e12)
    assert all(row["measured_tokens_per_s"] is None for row in found["rows"])
    for name in ("forecast.json", "forecast.html", "forecast.png"):
        assert (tmp_path / "report" / name).stat().st_size > 1000
    assert json.loads((tmp_path / "report" / "forecast.json").read_text()) == found
    page = (tmp_path / "report" / "forecast.html").read_text()
    assert "OLMoE: where running less pays" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_the_table_says_where_each_pays(run, config_only):
    code, out, _ = run(config_only, *MACHINE, "--concurrency", "1,16,256", "--keep", "0.5,0.25")
    assert code == 0 and "32 experts" in out and "16 experts" in out
    assert "Skipping experts pays 1.05x or more: top-7" in out and "Pruning pays" in out and "machine: 3350 GB/s" in out


@pytest.mark.parametrize(
    ("changes", "options", "bits"),
    [({"quantization_config": {"quant_method": "fp8"}}, ("--bits", "8"), 8), ({}, (), 16), ({"dtype": "float32"}, (), 32)],
)
def test_width_of_a_weight(run, config_only, changes, options, bits):
    (config_only / "config.json").write_text(json.dumps(OLMOE | changes))
    code, out, err = run(config_only, *MACHINE, *options, "--json")
    assert code == 0, err
    assert json.loads(out)["shape"]["bytes_per_weight"] == bits / 8


def test_latent_attention_and_shared_experts_are_counted(tmp_path):
    """DeepSeek-V2-Lite's published configuration, counted from the module tree as by hand."""
    from moe_prism.jobs.model_shape import config_tree, shape_of
    from tests.frontier.published import shape

    config = {
        "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "v_head_dim": 128, "vocab_size": 102400, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, expected = shape_of(config_tree(tmp_path)), shape("v2-lite")
    assert (found.layers, found.cached, found.attend) == (expected.layers, expected.cached, expected.attend)
    assert found.rest == pytest.approx(expected.rest, rel=1e-3)  # norms are not in the count by hand


def test_a_model_is_probed_and_measured(run, tiny_source, text_file):
    code, out, err = run(tiny_source, "--text", text_file, *SMALL, "--measure", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["name"] for row in found["rows"]] == ["top-2", "top-1", "2 experts"] * 2
    assert found["routing"] == {"source": str(text_file), "tokens": 512}
    assert found["machines"]["stock"]["fixed"] > 0 and found["median_error"] is not None
    assert [row["measured_tokens_per_s"] is not None for row in found["rows"]] == [True, True, False] * 2


def test_an_elastic_model_has_points_of_its_own(run, elastic_tiny, text_file):
    code, out, err = run(elastic_tiny, "--text", text_file, *SMALL, "--budgets", "0.5", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found["machines"]) == {"stock", "elastic"}
    cut = [row for row in found["rows"] if row["kind"] == "sub-experts"]
    assert [row["name"] for row in cut] == ["50% of bytes"] * 2
    assert (
        0 < cut[0]["distinct"] <= 8 and cut[0]["distinct"] < cut[1]["distinct"]
    )  # of 4 experts x 4 sub-experts; 8 slots at full budget


def test_given_machine_with_measured_routing(run, tiny_source, text_file):
    code, out, _ = run(tiny_source, *MACHINE, "--text", text_file, "--tokens", "512", "--json")
    assert code == 0 and json.loads(out)["routing"]["tokens"] == 512


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--concurrency", "0"), "--concurrency 0"),
        (("--concurrency", ""), "no list of counts"),
        (("--concurrency", "1,many"), "'1,many'"),
        (("--keep", "1.5"), "--keep 1.5"),
        (("--budgets", "0"), "--budgets 0"),
        (("--context", "0"), "--context 0"),
        (("--context", "inf"), "--context inf"),
        (("--prompt", "inf"), "--prompt inf"),
        (("--prompt", "-1"), "--prompt -1"),
        (("--bits", "0"), "--bits 0"),
        (("--tokens", "3"), "--tokens 3"),
        (("--seconds", "0"), "--seconds 0"),
        (("--bandwidth", "1GB/s"), "both --bandwidth and --peak"),
        (("--bandwidth", "fast", "--peak", "1TFLOPS"), "'fast'"),
        (("--bandwidth", "1GB/s", "--peak", "1GB/s"), "FLOPS"),
        (("--bandwidth", "0GB/s", "--peak", "1TFLOPS"), "impossible"),
        ((*MACHINE, "--measure"), "--measure"),
    ],
)
def test_bad_options(run, config_only, options, names):
    code, out, err = run(config_only, *options)
    assert code == 2 and out == "" and err.count("\n") == 1 and names in err and "; " in err, err


def test_bad_models(run, tmp_path, config_only):
    def line(*arguments):
        code, out, err = run(*arguments)
        assert code in (2, 4) and out == "" and err.count("\n") == 1, err
        return err

    assert "does not exist" in line(tmp_path / "missing", *MACHINE)
    assert "no MoE layer" in line(_saved("llama", tmp_path / "llama"), *MACHINE)
    (config_only / "config.json").write_text(json.dumps(OLMOE | {"model_type": "nonsense"}))
    assert "not one that transformers knows" in line(config_only, *MACHINE)
    (config_only / "config.json").write_text(json.dumps(OLMOE | {"quantization_config": {"quant_method": "fp8"}}))
    assert "--bits" in line(config_only, *MACHINE)
    (config_only / "config.json").write_text("{")
    assert "not JSON" in line(config_only, *MACHINE)
    shutil.rmtree(config_only)


def _saved(family, folder):
    save_tiny(family, folder)
    return folder


def test_quantities():
    assert quantity("--fixed", "4ms", ("s",)) == pytest.approx(4e-3)
    assert quantity("--fixed", "250 us", ("s",)) == pytest.approx(2.5e-4)
    assert quantity("--peak", "1.5PFLOPS", ("FLOPS", "FLOP/s")) == 1.5e15
    assert quantity("--bandwidth", "2e3GB/s", ("B/s",)) == 2e12
    for text in ("", "4", "4m", "-4ms", "1.2.3ms", "4ns/s"):
        with pytest.raises(UsageError, match="--fixed"):
            quantity("--fixed", text, ("s",))
