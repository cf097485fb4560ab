"""`moe-prism train`: what its recipes are refused for, and where."""

import json

import pytest

from moe_prism.cli import main
from tests.architectures.small import recipe

GOOD = """architecture: top-k
settings: {normalise: true}
model:
  hidden: 16
  layers: 1
  heads: 1
  experts: 4
  width: 8
  active: 2
  context: 64
text: [topics]
tokens: 4096
steps: 2
batch: 2
length: 64
"""


@pytest.fixture
def told(tmp_path, capsys):
    """told(recipe, *flags): the error line of a run."""

    def run(text, *flags):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        assert main(["train", str(file), "-o", str(tmp_path / "out"), *flags]) == 2
        return capsys.readouterr().err.replace(str(tmp_path) + "/", "")

    return run


@pytest.mark.parametrize(
    "change, line",
    [
        (("steps:", "stepz:"), "recipe.yaml:13: a recipe has no 'stepz'; did you mean 'steps'?"),
        (("  width: 8", "  widht: 8"), "recipe.yaml:8: model has no 'widht'; did you mean 'width'?"),
        (("architecture: top-k", "architecture: topk"), "recipe.yaml:1: no architecture 'topk'; did you mean 'top-k'?"),
        (("normalise", "normalize"), "recipe.yaml:2: top-k has no 'normalize'; did you mean 'normalise'?"),
        (("steps: 2\n", ""), "recipe.yaml:1: the recipe lacks 'steps'"),
        (("active: 2", "active: 5"), "recipe.yaml:3: model active 5 of 4 experts"),
        (("heads: 1", "heads: 3"), "recipe.yaml:3: model hidden 16 is no even multiple of 3 heads"),
        (("length: 64", "length: 65"), "recipe.yaml:1: length 65 is more than model.context 64"),
        (("batch: 2", "batch: many"), "recipe.yaml:14: batch: input should be a valid integer"),
        (("text: [topics]", "text: [domains]"), "'domains' is text that nothing is trained on"),
    ],
)
def test_a_wrong_recipe_is_told_by_line_and_nearest_key(told, change, line):
    assert line in told(GOOD.replace(*change))


def test_a_change_must_be_a_key_and_a_value(told):
    assert "--set 'seed' is not KEY=VALUE" in told(GOOD, "--set", "seed")
    assert "a recipe has no 'sead'; did you mean 'seed'?" in told(GOOD, "--set", "sead=1")


def test_training_with_changes_and_a_dry_run(tmp_path, capsys):
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(GOOD)
    assert main(["train", str(file), "-o", str(out), "--dry-run", "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)
    assert needed["peak_memory_bytes"] > needed["weights_bytes"] > 0 and needed["seconds"] > 0 and not out.exists()
    assert main(["train", str(file), "-o", str(out), "--set", "model.active=3", "--set", "seed=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert json.loads((out / "config.json").read_text())["num_experts_per_tok"] == 3
    assert json.loads((out / "prism.json").read_text())["training"]["seed"] == 7
    assert "<svg" in (out / "training.svg").read_text() and "2 steps, with seed 7" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["dynamic-moe", "rmoe"])
def test_every_zoo_recipe_is_one_that_can_be_read(name):
    from pathlib import Path

    from moe_prism.architectures import architectures
    from moe_prism.jobs.train_recipe import read_training

    files = sorted((Path(__file__).parents[2] / "recipes" / "zoo").glob("*.yaml"))
    found = {read_training(file).architecture for file in files}
    assert name in found and found <= set(architectures.names())
    assert recipe(name)["architecture"] == name
