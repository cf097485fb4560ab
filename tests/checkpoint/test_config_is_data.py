"""What a folder says in JSON is data (X01 of the fault list): bounded, and without what names code before any library reads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_prism.checkpoint.companions import without_code
from moe_prism.checkpoint.config import read_config
from moe_prism.checkpoint.view import as_data
from moe_prism.errors import PrismError, UsageError
from moe_prism.jobs.card_text import code, shown
from moe_prism.jobs.refactor_card import front_matter
from moe_prism.model import load_model, load_tokenizer

HOSTILE = {
    "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_attn_implementation_internal": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "use_kernels": True,
    "custom_generate": "evil",
}
EVERY_WAY = """
import sys
from moe_prism.jobs.calibrate import _longest
from moe_prism.jobs.inspect import inspect_model
from moe_prism.jobs.model_shape import config_tree
from moe_prism.model import load_model, load_tokenizer, resolve
folder = resolve(sys.argv[1])
load_model(folder), load_tokenizer(folder), inspect_model(folder), config_tree(folder), _longest(folder)
"""


@pytest.fixture
def copy(tiny_source, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_source, tmp_path / "copy"))


def changed(folder: Path, name: str = "config.json", **values) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


@pytest.mark.slow
def test_x01_no_way_to_open_a_folder_fetches_or_imports_what_it_names(copy, tmp_path):
    changed(copy, **HOSTILE)
    changed(copy, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_file="/etc/hostname")
    (copy / "generation_config.json").write_text(json.dumps({"max_length": 20, "custom_generate": "evil", "_x": 1}))
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}))
    (copy / "evil.py").write_text("raise SystemExit('executed')")
    fake = tmp_path / "fake"  # a package of the name that transformers would fetch kernels with
    (fake / "kernels").mkdir(parents=True)
    (fake / "kernels" / "__init__.py").write_text("def get_kernel(*a, **k): raise SystemExit(f'fetched {a}')\n" * 1)
    (fake / "kernels-99.dist-info").mkdir()
    (fake / "kernels-99.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99\n")
    path = os.pathsep.join([str(fake), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", EVERY_WAY, str(copy)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_library_sees_settings_vocabulary_and_weights_and_nothing_else(copy):
    changed(copy, **HOSTILE, parts=[{"auto_map": 1, "_private": 2, "kept": 3}])
    for name in ("evil.py", "pytorch_model.bin", "adapter_config.json", "tokenizer.pkl"):
        (copy / name).write_text("x")
    with as_data(copy, weights=True) as view:
        seen = {p.name for p in view.iterdir()}
        config = json.loads((view / "config.json").read_text())
    assert not seen & {"evil.py", "pytorch_model.bin", "adapter_config.json", "tokenizer.pkl"}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= seen
    assert not set(HOSTILE) & set(config) and config["parts"] == [{"kept": 3}]
    assert not view.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "32"}, "'hidden_size' must be a whole number"),
        ({"num_hidden_layers": -3}, "'num_hidden_layers'"),
        ({"num_hidden_layers": 10**7}, "'num_hidden_layers'"),
        ({"vocab_size": 10**12}, "'vocab_size'"),
        ({"num_experts": 10**9}, "'num_experts'"),
        ({"num_experts_per_tok": 1000}, "chooses 1000 experts per token of 4"),
        ({"max_position_embeddings": 10**18}, "'max_position_embeddings'"),
        ({"rope_theta": 10**400}, "'rope_theta'"),
        ({"dtype": "load"}, "'load', which is no type"),
        ({"text_config": {"dtype": "hub"}}, "'hub', which is no type"),
        ({"model_type": "../x"}, "'model_type'"),
        ({f"k{i}": i for i in range(20_000)}, "more than 2000 keys"),
        ({"id2label": {str(i): "x" for i in range(100_000)}}, "more than 1000000 values or 100000 keys"),
        ({"id2label": {f"{i:07}": "xxxxx" for i in range(450_000)}}, "8388608"),
    ],
)
def test_x01_numbers_that_no_model_has_are_refused_at_once(copy, change, said):
    changed(copy, **change)
    with pytest.raises(PrismError) as found:
        read_config(copy)
    assert said in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": 1, "a": 2}', '{"rms_norm_eps": NaN}', "null", "3", "[1]", '"\\ud800"', ""]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_x01_settings_that_are_no_json_object_are_one_line(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(PrismError) as found:
        load_tokenizer(copy) if name.startswith("tokenizer") else load_model(copy)
    assert "\n" not in str(found.value) and name in str(found.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_x01_links_that_lead_out_and_pipes_are_refused(copy, name, tmp_path):
    whole = (copy / name).read_bytes()
    (copy / name).unlink()
    (tmp_path / "outside").write_bytes(whole)
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="leads out of its folder"):
        load_tokenizer(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(PrismError, match=r"no plain file|has no config\.json|no tokenizer\.json"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    "text", ['{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[["a","b"]]}}', "[" * 50_000, "{}", "x"]
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(copy, text):
    (copy / "tokenizer.json").write_text(text)
    with pytest.raises(PrismError) as found:
        load_tokenizer(copy)
    assert "\n" not in str(found.value)


def test_what_is_written_names_no_code_at_any_depth():
    given = {
        "a": [{"auto_map": 1}],
        "vision_config": {"_attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel", "x": 1},
        "attn_implementation": "sdpa",
    }
    written = json.loads(without_code("config.json", json.dumps(given).encode()))
    assert written == {"a": [{}], "vision_config": {"x": 1}, "attn_implementation": "sdpa"}
    assert without_code("config.json", b'{"auto_map": ') == b'{"auto_map": '


def test_text_from_elsewhere_stays_text_in_a_card():
    evil = "<img src=x>\n---\n# a `b` [c](javascript:d)"
    assert "<" not in shown(evil) and "\n" not in shown(evil) and "\\[c\\]\\(" in shown(evil)
    assert "`" not in code(evil) and "\n" not in code(evil)
    facts = {"source": {"name": "owner/model"}, "companions": {"licence": {"license": evil, "license_link": "'yes'"}}}
    found = yaml.safe_load(front_matter(facts, evil).strip("-\n"))
    assert found["license"].startswith("<img") and found["license_link"] == "yes" and found["tags"][2].startswith("<img")
    assert (found["base_model"], found["base_model_relation"]) == ("owner/model", "finetune")
    facts["source"]["name"] = "a-folder"
    assert "base_model" not in front_matter(facts, "olmoe"), "no hub knows a folder of this machine"
