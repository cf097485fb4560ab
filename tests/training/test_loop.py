"""The loop: what a run that was interrupted goes on to, and what its parts do to a model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from moe_prism.architectures import architectures
from moe_prism.architectures.base import StepPlace, routers
from moe_prism.checkpoint.shards import Source
from moe_prism.errors import UsageError
from moe_prism.jobs.train import train
from moe_prism.training.batches import Batches
from moe_prism.training.experts import trained_experts
from moe_prism.training.muon import learning_rate, orthogonal
from tests.architectures.small import example, model_of, recipe, trained
from tests.tiers import by_night


class Stopped(Exception):
    """The run was interrupted."""


def weights_of(folder):
    source = Source(folder)
    return {name: source.tensor(name) for name in source.names()}


STOPS = [(name, at) for name in ("elastic", "smoe-dropout", "sinkhorn", "rexmoe", "mote") for at in (1, 3, 5)]
COMMIT = (("elastic", 3), ("mote", 1), ("sinkhorn", 5))


@pytest.mark.parametrize(("name", "at"), by_night(STOPS, *COMMIT))
def test_an_interrupted_training_ends_in_the_same_losses_and_the_same_weights(name, at, tmp_path, monkeypatch):
    from moe_prism.training.loop import Training

    whole = trained(tmp_path / "whole", name)
    own = Training._update

    def stop(self, recorder):
        if self.step == at:
            raise Stopped
        return own(self, recorder)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Training, "_update", stop)
        trained(tmp_path / "cut", name)
    again = train(recipe(name), tmp_path / "cut", resume=True)
    assert again.curve == whole.curve
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert (tmp_path / "whole" / "training.json").read_bytes() == (tmp_path / "cut" / "training.json").read_bytes()


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_losses(tmp_path):
    wanted = recipe("elastic", steps=40, keep_every=5)
    file = tmp_path / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(wanted))
    whole = train(file, tmp_path / "whole")
    words = [sys.executable, "-m", "moe_prism", "train", str(file), "-o", str(tmp_path / "cut")]
    run = subprocess.Popen(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "cut.partial" / "state-1.safetensors").exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "cut").exists()
    assert train(file, tmp_path / "cut", resume=True).curve == whole.curve


def test_a_state_that_was_half_written_is_not_taken(tmp_path, monkeypatch):
    from moe_prism.training.loop import Training

    own = Training._update
    monkeypatch.setattr(Training, "_update", lambda self, r: (_ for _ in ()).throw(Stopped) if self.step == 5 else own(self, r))
    with pytest.raises(Stopped):
        trained(tmp_path / "cut", "top-k")
    monkeypatch.setattr(Training, "_update", own)
    newest = tmp_path / "cut.partial" / "state-0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = train(recipe("top-k"), tmp_path / "cut", resume=True)
    assert again.curve == trained(tmp_path / "whole", "top-k").curve


def test_what_was_started_with_another_recipe_is_not_continued(tmp_path, monkeypatch):
    from moe_prism.training.loop import Training

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Training, "_update", lambda self, r: (_ for _ in ()).throw(Stopped))
        trained(tmp_path / "cut", "top-k")
    with pytest.raises(UsageError, match="another recipe"):
        train(recipe("top-k", steps=7), tmp_path / "cut", resume=True)


@pytest.mark.slow
def test_seeds_differ_and_one_seed_does_not(tmp_path):
    first, same, other = (trained(tmp_path / str(i), "top-k", seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert first.curve == same.curve != other.curve


def test_experts_in_training_are_those_of_the_family():
    model = model_of(example("top-k"))
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 16, generator=generator), torch.rand(9, 2, generator=generator)
    index = torch.randint(0, 5, (9, 2), generator=generator)  # 4 is none
    own, theirs = trained_experts(experts, x, index, weight), type(experts).forward.__wrapped__(experts, x, index, weight)
    assert torch.allclose(own, theirs, atol=1e-6)
    for parameter in (experts.gate_up_proj, experts.down_proj):
        first = torch.autograd.grad(own.square().sum(), parameter, retain_graph=True)[0]
        second = torch.autograd.grad(theirs.square().sum(), parameter, retain_graph=True)[0]
        assert torch.allclose(first, second, atol=1e-5)


def test_every_window_comes_once_per_epoch():
    batches = Batches(torch.arange(101), 10, 2, seed=3)
    rows = torch.cat([batches(step)[:, 0] for step in range(5)])
    assert sorted(rows.tolist()) == list(range(0, 100, 10))
    assert torch.equal(batches(7), Batches(torch.arange(101), 10, 2, seed=3)(7))


def test_orthogonal_updates_have_singular_values_near_one():
    found = orthogonal(torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.4


def test_the_rate_warms_up_stays_and_falls_to_nothing():
    assert learning_rate(0.0) < 0.1 and learning_rate(0.3) == 1.0
    assert learning_rate(0.775, 0.45) == pytest.approx(0.5) and learning_rate(1.0) == 0.0
    assert learning_rate(0.99, 0.0) == 1.0


def test_a_frozen_router_does_not_change_and_k_grows_to_all(tmp_path):
    trained(tmp_path / "out", "smoe-dropout")
    weights = weights_of(tmp_path / "out")
    kind = architectures.get("smoe-dropout")
    architecture = kind(*kind.example())
    drawn = model_of_like(architecture)
    names = [name for name in weights if name.endswith("gate.weight")]
    assert names and all(torch.equal(weights[name], drawn[name]) for name in names)
    counts = [architecture.count(step / 100) for step in range(101)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 4


def model_of_like(architecture):
    """The weights that a training with nano's vocabulary begins with."""
    from moe_prism.architectures.base import TokenIds
    from moe_prism.training.loop import draw_weights

    model = architecture.build(architecture.config(TokenIds(4096, 0, 0, 0)))
    draw_weights(model, 0)
    return dict(model.named_parameters())


def test_k_of_the_lowest_layers_falls_to_one():
    architecture = example("sigma-moe", first=3, share=0.5, layers=0.25)
    assert [architecture.count(0, 4, share) for share in (0.0, 0.25, 0.5, 1.0)] == [3, 2, 1, 1]
    assert [architecture.count(1, 4, share) for share in (0.0, 1.0)] == [1, 1]
    model = model_of(architecture)
    (schedule,) = architecture.parts()
    schedule.begin(model, StepPlace(0, 10, 0))
    assert [router.top_k for router in routers(model)] == [3, 1]


@pytest.mark.parametrize("name", ["elastic", pytest.param("sinkhorn", marks=pytest.mark.slow)])
def test_parts_of_a_batch_are_the_batch_to_rounding(name, tmp_path):
    whole, parts = (trained(tmp_path / str(n), name, settings={}, parts=n, balance=0.0, z=0.0, batch=4) for n in (1, 2))
    if name == "elastic":  # budgets are drawn per part
        assert whole.curve.train[0] == pytest.approx(parts.curve.train[0], abs=1e-5)
        return
    assert whole.curve.train[0] == pytest.approx(parts.curve.train[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elastic", "top-k"])
def test_two_processes_give_what_one_gives_to_the_bit(name, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(name, parts=4, batch=4)))
    one = train(file, tmp_path / "one")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moe_prism"]
    words += ["train", str(file), "-o", str(tmp_path / "two")]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "training.json").read_text())["train"] == one.curve.train
    first, second = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_processes_share_parts_evenly_or_not_at_all():
    from moe_prism.training.processes import Processes

    with pytest.raises(UsageError, match="3 processes cannot share 4 parts"):
        Processes(0, 3).check(4)
    assert [list(Processes(rank, 2).own(4)) for rank in (0, 1)] == [[0, 2], [1, 3]]


def test_a_run_that_stops_early_is_the_beginning_of_the_whole_one(tmp_path):
    whole, part = trained(tmp_path / "whole", "top-k"), trained(tmp_path / "part", "top-k", stop=4)
    assert part.curve.train == whole.curve.train[:4] and part.to_json()["steps"] == 4


@pytest.mark.parametrize("name", ["mote"])
def test_frozen_parameters_stay_as_they_are_in_parts_of_a_batch_too(name, tmp_path):
    whole, parts = (trained(tmp_path / str(n), name, parts=n, balance=0.0, z=0.0) for n in (1, 2))
    assert whole.curve.train == pytest.approx(parts.curve.train, abs=1e-3)
