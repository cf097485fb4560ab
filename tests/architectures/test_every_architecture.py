"""What holds for every registered architecture, by its example."""

import json

import pytest
import torch

import moe_prism
from moe_prism.architectures import architectures
from moe_prism.architectures.base import routers
from moe_prism.artefact.open import open_model
from moe_prism.model import find_layers, load_model
from tests.architectures.small import example, logits_of, model_of, recipe, trained

NAMES = architectures.names()
IDS = torch.arange(7, 47)[None]


@pytest.fixture(scope="session")
def checkpoint(shared):
    """checkpoint(name): a folder with the example of an architecture after six steps."""
    return lambda name: shared(f"trained-{name}", lambda folder: trained(folder, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_what_the_model_gave_when_training_ended(name, tmp_path, monkeypatch):
    from moe_prism.training.loop import Training

    kept = []
    monkeypatch.setattr(Training, "run", lambda self, *given, own=Training.run: kept.append(self) or own(self, *given))
    trained(tmp_path / "out", name)
    with torch.no_grad():
        wanted = kept[0].model(input_ids=IDS, use_cache=False).logits
        model = load_model(tmp_path / "out")
        found = model(input_ids=IDS, use_cache=False).logits
        model.save_pretrained(tmp_path / "again")
        again = load_model(tmp_path / "again")(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(found, wanted, atol=1e-6) and torch.equal(found, again)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_lowers_the_loss_of_its_own_text(name):
    from moe_prism.architectures.parts import RouterLosses
    from moe_prism.schema.training import TrainingForm
    from moe_prism.training.loop import Training

    architecture = example(name)
    form = TrainingForm.model_validate(recipe(name, model=architecture.shape.model_dump(), steps=30, length=16, decay=0.0))
    text = torch.randint(0, 64, (33,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    training = Training(form, model_of(architecture), [RouterLosses(0.01, 1e-4), *architecture.parts()], (text, text))
    training.run(lambda _state: None, lambda _step, _steps: None)
    assert training.curve.train[-1] < training.curve.train[0] - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_product_takes_the_checkpoint(name, checkpoint):
    folder = checkpoint(name)
    assert moe_prism.inspect_model(folder).to_json()["layers"]
    opened = open_model(folder)
    model = opened.model
    assert moe_prism.generate(model, opened.tokenizer, "import os", sampling=moe_prism.GenerateOptions(max_tokens=3)).tokens == 3
    assert [layer.num_experts for layer in find_layers(model)] == [4, 4]
    assert moe_prism.verify(folder).to_records()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_frontier_is_measured_on_the_checkpoint(name, checkpoint, text_file, tmp_path):
    one = json.loads((checkpoint(name) / "config.json").read_text())["num_experts_per_tok"] == 1
    options = moe_prism.FrontierOptions(
        methods=("rtn" if one else "uniform",), text=str(text_file), tokens=512, length=64, calibration_tokens=512
    )
    found = moe_prism.measure_frontier(checkpoint(name), options)
    assert found.points and all(point.kl >= 0 for point in found.points)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_architecture_needs_is_named_and_nothing_else_is_taken(name):
    kind = architectures.get(name)
    shape, settings = kind.example()
    assert kind(shape, settings).config is not None
    with pytest.raises(ValueError, match="extra_forbidden"):
        kind(shape, settings | {"no_such_setting": 1})


@pytest.mark.parametrize("name", NAMES)
def test_routers_are_found_and_the_configuration_is_plain_json(name):
    model = model_of(example(name))
    assert len(routers(model)) >= 2
    json.dumps(model.config.to_dict())
    assert torch.isfinite(logits_of(model)).all()
