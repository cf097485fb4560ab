"""An adapter's folder: what is made of a fine-tune, and what is refused of a file."""

import json
import shutil

import pytest
import torch

from moe_prism import cli
from moe_prism.adapters.file import base_digest, read_adapter
from moe_prism.checkpoint.atomic import sha256_file
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.adapter import make_adapter
from moe_prism.model import find_layers, load_model
from moe_prism.options.adapter import AdapterOptions
from tests.adapters.tuned import TUNED, fine_tune, three


@pytest.fixture(scope="session")
def tiny_adapters(shared, tiny_source):
    return shared("tiny-adapters", lambda folder: three(tiny_source, folder))


def test_the_experts_that_changed_are_kept_and_no_others(tiny_adapters, tiny_source):
    for i, tuned in enumerate(TUNED):
        adapter = read_adapter(tiny_adapters / f"a{i}")
        assert adapter.form.layers == tuned and adapter.form.base == base_digest(tiny_source)
        layers = find_layers(load_model(tiny_adapters / f"t{i}"))
        for number, (layer, own) in enumerate(zip(layers, tuned, strict=True)):
            for matrix, view in enumerate((layer.gate, layer.up, layer.down) if own else ()):
                assert torch.equal(adapter.written(number, matrix, torch.zeros_like(view[own])), view[own])


def test_a_packed_adapter_holds_signs_of_the_largest_differences(tiny_adapters, tiny_source, tmp_path):
    done = make_adapter(tiny_adapters / "t0", tiny_source, tmp_path / "packed", AdapterOptions(pack=0.2))
    adapter = read_adapter(tmp_path / "packed")
    new, old = (find_layers(load_model(f))[0] for f in (tiny_adapters / "t0", tiny_source))
    delta = (new.up - old.up)[[0, 2]].detach()
    made = adapter.written(0, 1, old.up[[0, 2]].detach()) - old.up[[0, 2]].detach()
    kept = made.abs() > 1e-6
    assert kept.flatten(1).sum(1).tolist() == [round(0.2 * delta[0].numel())] * 2
    assert torch.equal(made.sign()[kept], delta.sign()[kept])
    assert delta.abs()[0][kept[0]].min() >= delta.abs()[0][~kept[0]].max()
    assert adapter.stored_bytes < 0.1 * done.whole_bytes
    assert done.to_json()["packed"] and done.to_json()["per_layer"] == [2, 1]


def test_a_fine_tune_that_changed_more_than_experts_is_refused_unless_that_is_left_out(tiny_source, tmp_path):
    fine_tune(tiny_source, tmp_path / "tuned", [[0], []])
    model = load_model(tmp_path / "tuned")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight += 1
    model.save_pretrained(tmp_path / "more")
    with pytest.raises(UsageError, match=r"changed model.layers.0.mlp.gate.weight too"):
        make_adapter(tmp_path / "more", tiny_source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = make_adapter(tmp_path / "more", tiny_source, tmp_path / "out", AdapterOptions(experts_only=True))
    assert done.left_out == ("model.layers.0.mlp.gate.weight",) and done.form.layers == [[0], []]


def test_bad_pairs_are_refused(tiny_source, tiny_adapters, tmp_path):
    with pytest.raises(UsageError, match="has the experts of its base"):
        make_adapter(tiny_source, tiny_source, tmp_path / "out")
    with pytest.raises(UsageError, match="not of one shape"):
        make_adapter("nano", tiny_source, tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        make_adapter(tiny_adapters / "t0", tiny_source, tiny_adapters / "a0")


def test_the_command_says_what_it_wrote(tiny_source, tiny_adapters, tmp_path, capsys):
    asked = ["adapter", tiny_adapters / "t2", "--base", tiny_source, "-o", tmp_path / "out", "--pack", "0.3", "--json"]
    assert cli.main(list(map(str, asked))) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["per_layer"] == [2, 2] and facts["experts"] == 4 and facts["bytes"] < facts["whole_bytes"]
    assert cli.main([*map(str, asked), "--force"]) == 0
    assert cli.main(list(map(str, asked))) == 2 and "exists" in capsys.readouterr().err


def damaged(tiny_adapters, tmp_path, change):
    folder = tmp_path / "bad"
    shutil.copytree(tiny_adapters / "a0", folder)
    facts = json.loads((folder / "adapter.json").read_text())
    change(facts, folder)
    (folder / "adapter.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f, _: f.update(version=2), "version"),
        (lambda f, _: f.update(more=1), "not known"),
        (lambda f, _: f["layers"].__setitem__(0, [2, 0]), "must rise"),
        (lambda f, _: f["layers"].__setitem__(0, [0, 4]), "names expert 4 of 4"),
        (lambda f, _: f["layers"].__setitem__(0, [0, 1, 2]), r"is F32\[2, 16, 32\], not"),
        (lambda f, _: f["layers"].__setitem__(0, []), "is not known"),
        (lambda f, _: f.update(tensors="0" * 64), "was changed"),
        (lambda f, _: f.update(packed={"codec": "compeft", "keep": 2.0, "size": 0.0}), "keep"),
        (lambda f, _: f.update(width=8), "is F32"),
        (lambda _, folder: (folder / "adapter.safetensors").unlink(), "has no adapter.safetensors"),
        (lambda _, folder: (folder / "adapter.safetensors").write_bytes(b"\0" * 40), "header"),
    ],
)
def test_a_folder_that_is_not_what_it_says_is_refused(tiny_adapters, tmp_path, change, says):
    with pytest.raises(CorruptError, match=says):
        read_adapter(damaged(tiny_adapters, tmp_path, change))


def test_bytes_that_are_no_five_signs_are_refused(tiny_adapters, tiny_source, tmp_path):
    make_adapter(tiny_adapters / "t0", tiny_source, tmp_path / "packed", AdapterOptions(pack=0.2))
    file = tmp_path / "packed" / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] = 255
    file.write_bytes(data)
    facts = json.loads((tmp_path / "packed" / "adapter.json").read_text())
    facts["tensors"] = sha256_file(file)
    (tmp_path / "packed" / "adapter.json").write_text(json.dumps(facts))
    with pytest.raises(CorruptError, match="no five signs"):
        read_adapter(tmp_path / "packed")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UsageError, match="moe-prism adapter"):
        read_adapter(tmp_path)
