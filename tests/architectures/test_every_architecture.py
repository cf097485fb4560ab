"""What holds for every registered architecture, by its example."""

import json

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_prism
from moe_prism import cli
from moe_prism.architectures import architectures
from moe_prism.architectures.base import routers
from moe_prism.artefact.open import open_model
from moe_prism.errors import UsageError
from moe_prism.jobs.train import train
from moe_prism.model import find_layers, load_model
from tests.architectures.small import draws, example, logits_of, model_of, need_pictures, recipe, trained
from tests.tiers import by_night

NAMES = architectures.names()
WRITING = [name for name in NAMES if not draws(name)]
ONE_OF_EACH = ("top-k", "moe-plus-plus", "rmoe", "mote")
"""Plain routing, experts that compute nothing, a router with a memory, experts of three values."""


@pytest.fixture(scope="session")
def checkpoint(shared):
    """checkpoint(name): a folder with the example of an architecture after six steps; beside it what the model gave at the end."""
    from moe_prism.training.loop import Training

    def build(folder, name):
        kept, own = [], Training.run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "run", lambda self, *given: kept.append(self) or own(self, *given))
            trained(folder, name)
        save_file({"logits": logits_of(kept[0].model)}, given_by(folder))

    def get(name):
        need_pictures(name)
        return shared(f"trained-{name}", lambda folder: build(folder, name))

    return get


def given_by(folder):
    """Where the logits of the model lie that was trained into a folder."""
    return folder.with_name(f"{folder.name}.logits")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_what_the_model_gave_when_training_ended(name, checkpoint, tmp_path):
    folder = checkpoint(name)
    wanted, model = load_file(given_by(folder))["logits"], load_model(folder)
    found = logits_of(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.allclose(found, wanted, atol=1e-6) and torch.equal(found, logits_of(load_model(tmp_path / "again")))


@pytest.mark.parametrize("name", by_night(NAMES, *ONE_OF_EACH))
def test_a_step_lowers_the_loss_of_its_own_text(name):
    from moe_prism.architectures.parts import RouterLosses
    from moe_prism.schema.training import TrainingForm
    from moe_prism.training.loop import Training

    architecture = example(name)
    form = TrainingForm.model_validate(recipe(name, model=architecture.shape.model_dump(), steps=30, length=16, decay=0.0))
    data, task = torch.randint(0, 64, (33,), generator=torch.Generator().manual_seed(0)).to(torch.int32), architecture.task()
    if task is not None:
        form = form.model_copy(update={"batch": 32})
        data = torch.cat([torch.ones(40, 64), torch.arange(40)[:, None] % 10], 1)
    training = Training(form, model_of(architecture), [RouterLosses(0.01, 1e-4), *architecture.parts()], (data, data), task)
    training.run(lambda _state: None, lambda _step, _steps: None)
    assert training.curve.train[-1] < training.curve.train[0] - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_product_takes_the_checkpoint(name, checkpoint):
    folder = checkpoint(name)
    assert moe_prism.inspect_model(folder).to_json()["layers"]
    assert moe_prism.verify(folder).to_records()
    assert [layer.num_experts for layer in find_layers(load_model(folder))] == [4, 4]
    if name in WRITING:
        opened = open_model(folder)
        asked = moe_prism.GenerateOptions(max_tokens=3)
        assert moe_prism.generate(opened.model, opened.tokenizer, "import os", sampling=asked).tokens == 3


@pytest.mark.parametrize("name", [name for name in NAMES if draws(name)])
def test_what_wants_text_refuses_a_model_that_draws(name, checkpoint, tmp_path, capsys):
    folder = str(checkpoint(name))
    for words in (
        ["generate", folder, "--prompt", "a"], ["frontier", folder, "-o", str(tmp_path / "a")],
        ["refactor", folder, "-o", str(tmp_path / "b")], ["calibrate", folder, "-o", str(tmp_path / "c")],
    ):  # fmt: skip
        assert cli.main(words) != 0
        assert "draws pictures" in capsys.readouterr().err
    with pytest.raises(UsageError, match="takes no 'text'"):
        train(recipe(name, text=["topics"]), tmp_path / "d")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITING)
def test_a_refactored_checkpoint_at_full_budget_is_the_checkpoint(name, checkpoint, text_file, tmp_path):
    calibration = moe_prism.CalibrateOptions(text=str(text_file), tokens=512, length=32, reservoir=64)
    moe_prism.refactor(checkpoint(name), tmp_path / "cut", moe_prism.RefactorOptions(n_sub=4, calibration=calibration))
    wanted = logits_of(load_model(checkpoint(name), torch.float32))
    model, _ = moe_prism.load(tmp_path / "cut", torch.float32)
    for always in (False, True):
        model._moe_prism.always_split = always
        with moe_prism.operating_point(model, 1.0):
            assert float((logits_of(model) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    with moe_prism.operating_point(model, 0.7):
        assert torch.isfinite(logits_of(model)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITING)
def test_a_server_gives_the_tokens_of_generate(name, checkpoint):
    from tests.serve.house import open_house

    opened = open_model(checkpoint(name))
    own = moe_prism.generate(opened.model, opened.tokenizer, "import os", sampling=moe_prism.GenerateOptions(max_tokens=5))
    with open_house(checkpoint(name)) as house, httpx2.Client(base_url=house.root, timeout=60) as web:
        body = {"prompt": "import os", "max_tokens": 5, "temperature": 0, "model": f"{house.built.service.name}@full"}
        assert web.post("/v1/completions", json=body).json()["choices"][0]["text"] == own.text


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITING)
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
