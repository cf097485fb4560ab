"""What lies beside the weights travels, unless it can be executed, holds other weights or leads out; then it is named."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

from moe_prism.checkpoint.companions import companions, licence, origin
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.refactor import refactor
from moe_prism.jobs.verify import verify
from moe_prism.options.prune import PruneOptions
from moe_prism.options.refactor import RefactorOptions

TRAVELS = {
    "chat_template.jinja": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "tekken.json": "{}",
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "processor_config.json": '{"auto_map": {"AutoProcessor": "evil.Evil"}, "size": 3}',
    "LICENSE": "terms",
    "docs/figure 1.svg": "<svg/>",
    "params.json": "{}",
}
STAYS = {
    "modeling_evil.py": ("raise SystemExit", "code"),
    "run": ("#!/bin/sh\n", "code"),
    "custom_generate/generate.py": ("", "code"),
    "training_args.bin": ("x", "other weights"),
    "original/consolidated.00.pth": ("x", "other weights"),
    "onnx/model.onnx": ("x", "other weights"),
    "imatrix.pkl": ("x", "code"),
    "vocabulary.dat": ("\x80\x04.", "code"),
}
CARD = "---\nlicense: other\nlicense_name: tiny-terms\nlicense_link: LICENSE\ntags:\n- x\n---\n# A card\n"


@pytest.fixture(scope="module")
def source(tiny_source, tmp_path_factory):
    folder = shutil.copytree(tiny_source, tmp_path_factory.mktemp("beside") / "source")
    for name, text in {
        **TRAVELS,
        **{name: text for name, (text, _) in STAYS.items()},
        "README.md": CARD,
        ".git/config": "x",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode("latin-1"))
    return folder


def test_what_travels_and_what_is_named(source):
    carried, left = companions(source)
    assert {*TRAVELS, "README.md", "config.json", "tokenizer.json"} <= set(carried)
    shards = {p.name for p in source.glob("model*.safetensors")}  # nobody told it which weights are the model's
    assert {name: reason for name, reason in left.items() if name not in shards} == {
        name: reason for name, (_, reason) in STAYS.items()
    }


@pytest.fixture(scope="module")
def outputs(source, tmp_path_factory, tiny_calibration):
    folder = tmp_path_factory.mktemp("outputs")
    refactor(source, folder / "elastic", RefactorOptions(calibration=tiny_calibration, profile_tokens=0))
    prune_model(source, folder / "pruned", PruneOptions(criterion="first-half"))
    prune_model(folder / "elastic", folder / "both", PruneOptions(criterion="first-half"))
    return folder


@pytest.mark.parametrize("kind", ["elastic", "pruned", "both"])
def test_outputs_hold_it_all(kind, outputs, source):
    out = outputs / kind
    verify(out)
    for name, text in TRAVELS.items():
        if name != "processor_config.json":
            assert (out / name).read_text() == text
    assert json.loads((out / "processor_config.json").read_text()) == {"size": 3}
    assert not [name for name in STAYS if (out / name).exists()] and not (out / ".git").exists()
    assert (out / "README-source.md").read_text() == CARD
    assert isinstance(AutoTokenizer.from_pretrained(out).chat_template, dict)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "tiny-terms", "LICENSE")
    assert "base_model" not in front and front["library_name"] == "transformers"  # `source` is a folder, which no hub knows
    left = json.loads((out / "prism.json").read_text())["companions"]["left_out"]
    assert left == ({} if kind == "both" else {name: reason for name, (_, reason) in STAYS.items()})


def test_a_changed_file_in_a_folder_is_found(outputs, tmp_path):
    from moe_prism.errors import CorruptError

    out = shutil.copytree(outputs / "pruned", tmp_path / "out")
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("{{ other }}")
    (out / "docs" / "more").write_text("x")
    with pytest.raises(CorruptError, match=r"docs/more is not in prism\.json; additional_chat_templates/tool_use\.jinja"):
        verify(out)


def test_links_that_lead_out_do_not_travel(tiny_source, tmp_path, monkeypatch):
    source = shutil.copytree(tiny_source, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    (source / "NOTICE").symlink_to(source / "config.json")
    (source / "folder").symlink_to(tmp_path)
    carried, left = companions(source)
    assert "NOTICE" in carried and left["LICENSE"] == "a link that leads out of the folder" and left["folder"] == "no plain file"
    monkeypatch.setenv("MOE_PRISM_FOLLOW_LINKS", "1")
    assert "LICENSE" in companions(source)[0]


def test_a_card_without_terms(tmp_path):
    (tmp_path / "README.md").write_bytes(b"# no front matter \xff\nlicense: mit\n")
    assert licence(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\r\nlicense: mit\r\n---\r\n")
    assert licence(tmp_path) == {"license": "mit"}


def test_the_name_of_a_hub_cache(tmp_path):
    folder = tmp_path / "models--me--tiny-moe" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert origin(folder) == "me/tiny-moe" and origin(tmp_path) == tmp_path.name
