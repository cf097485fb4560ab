"""Trainings that begin from a model, follow a teacher, find their own sizes, or send few entries of their gradients."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moe_prism.architectures.base import StepPlace, StepSeen
from moe_prism.architectures.parts import experts_of
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.compress.shape_search import parameters, shape_within
from moe_prism.errors import UsageError
from moe_prism.jobs.train import train
from moe_prism.model import load_model
from moe_prism.schema.training import ExchangeForm, ShapeForm
from moe_prism.training.exchange import Exchange
from moe_prism.training.processes import Processes
from moe_prism.training.teacher import AlikeExperts, Teacher, first_alike
from tests.architectures.small import example, logits_of, model_of, recipe, trained

SMALL = {"text": ["topics"], "tokens": 6000, "length": 64, "steps": 4, "batch": 2, "keep_every": 2, "judge_every": 3}


@pytest.fixture(scope="module")
def plain(shared):
    return shared("begun-top-k", lambda folder: trained(folder, "top-k"))


def test_a_model_goes_on_from_where_it_was(plain, tmp_path):
    found = train({**SMALL, "start": str(plain), "rate_matrix": 1e-4, "rate_rest": 1e-4}, tmp_path / "on")
    before = json.loads((plain / "training.json").read_text())["held_out"][-1]["loss"]
    assert found.curve.held[-1][1] == pytest.approx(before, abs=0.2)
    again = train({**SMALL, "start": str(plain), "rate_matrix": 1e-4, "rate_rest": 1e-4}, tmp_path / "on", resume=True)
    assert again.curve == found.curve
    manifest = json.loads((tmp_path / "on" / "prism.json").read_text())
    assert manifest["inputs"]["start"]["files"] and manifest["source"]["name"] == manifest["inputs"]["start"]["name"]


@pytest.mark.parametrize("which", ["experts", "routers"])
def test_only_what_is_to_be_trained_moves(which, plain, tmp_path):
    train({**SMALL, "start": str(plain), "trained": which}, tmp_path / which)
    before, after = (load_model(folder).state_dict() for folder in (plain, tmp_path / which))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all((".experts." if which == "experts" else ".gate.") in name for name in moved)


@pytest.mark.slow
def test_a_teacher_adds_its_divergence_and_pulls_the_model_to_itself(plain, tmp_path):
    teacher = load_model(plain, torch.float32)
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits
    own = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    seen = StepSeen(StepPlace(0, 1, 0), ids, own, (), again=lambda: own)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=theirs), torch.distributions.Categorical(logits=own)
    ).mean()
    assert Teacher(teacher, 2.0).loss(seen).item() == pytest.approx(2 * float(wanted), rel=1e-4)
    distances = []
    for weight in (0.0, 3.0):
        asked = recipe("top-k", seed=1, steps=12, teacher=str(plain), distil=weight)
        train(asked, tmp_path / str(weight))
        with torch.no_grad():
            student = load_model(tmp_path / str(weight), torch.float32)(input_ids=ids, use_cache=False).logits
        distances.append(float((theirs.softmax(-1) * (theirs.log_softmax(-1) - student.log_softmax(-1))).sum()))
    assert distances[1] < distances[0]


def test_experts_that_are_one_stay_one():
    model = model_of(example("top-k"))
    module = experts_of(model)[0]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[2] = parameter[0]
    assert first_alike(module).tolist() == [0, 1, 0, 3]
    part = AlikeExperts()
    part.start(model)
    from moe_prism.training.experts import training_experts

    with training_experts(model):
        model(input_ids=torch.arange(20)[None], use_cache=False).logits.square().sum().backward()
    assert not module.down_proj.grad[2].any()  # all of it reached the first one
    with torch.no_grad():
        module.down_proj += 1
        module.down_proj[2] = 7
    part.finish(model)
    assert torch.equal(module.down_proj[2], module.down_proj[0])


def test_a_trained_model_becomes_an_ada_moe_with_the_same_experts(plain):
    source = load_model(plain, torch.float32)
    whole = example("adamoe", nulls=0).adopt(source, 0)
    assert torch.allclose(logits_of(whole), logits_of(source), atol=1e-6)
    model = example("adamoe", nulls=12, choices=8).adopt(source, 0)
    assert model.config.num_experts_per_tok == 8 and model.config.null_experts == 12
    true, null = model.model.layers[0].mlp.gate.weight.split([4, 12])
    near = torch.cdist(null, true).argmin(1)
    assert torch.bincount(near).tolist() == [3, 3, 3, 3]
    source.config.norm_topk_prob = False
    gate = example("adamoe", nulls=12, choices=8).adopt(source, 0).model.layers[0].mlp.gate
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    weights, ids = (tensor.detach() for tensor in gate(x)[1:])
    plain_weights = (x @ true.T).softmax(-1).detach()
    for row in range(9):
        for weight, chosen in zip(weights[row], ids[row], strict=True):
            assert float(weight) == pytest.approx(float(plain_weights[row, chosen]) if chosen < 4 else 0.0, abs=1e-6)


@pytest.mark.slow
def test_nano_is_made_an_ada_moe_and_trained(tmp_path):
    asked = SMALL | {"tokens": 3000, "steps": 2, "batch": 1, "rate_matrix": 1e-3, "rate_rest": 1e-4, "balance": 0.0}
    asked |= {"architecture": "adamoe", "start": "nano", "settings": {"nulls": 64, "choices": 8}}
    found = train(asked, tmp_path / "out")
    assert found.curve.train[0] < 5  # it knows Python
    config = load_model(tmp_path / "out").config
    assert (config.model_type, config.null_experts, config.num_experts) == ("prism_adamoe", 64, 32)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license:" in card and "began with the weights of `nano`" in card


def test_limits_leave_the_least_weighted_choices_out_in_training_alone():
    from moe_prism.architectures.moe_plus_plus import Capacity, within

    weights, ids = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]), torch.tensor([[0, 1], [0, 2], [0, 1]])
    kept = within(weights, ids, torch.tensor([2.0, 1.0, 5.0]))
    assert kept.tolist() == [[True, False], [False, True], [True, True]]
    model, part = model_of(example("moe-plus-plus")), Capacity(1.0, 0.75, 4)
    before = logits_of(model)
    part.start(model)
    assert torch.equal(logits_of(model), before)
    gate = model.model.layers[0].mlp.gate
    gate.train()
    _, weights, ids = gate(torch.ones(40, 16))  # all of them want the same
    share = 0.75 / (0.75 * 4 + 4)
    wanted = [int(80 * (share if column < 4 else share / 0.75)) for column in ids[0].tolist()]
    assert [(weights[:, i] > 0).sum().item() for i in range(2)] == wanted


def test_a_shape_is_found_that_fits_and_computes_much():
    found = shape_within(3_000_000, 4096, 2, context=128)
    sizes = np.array([[found.layers, found.hidden, found.hidden // found.heads, found.experts, found.width, found.active]], float)
    assert 0.97 < 2 * float(parameters(sizes, 4096)[0]) / 3_000_000 <= 1 and found.active * 4 <= found.experts
    assert found == shape_within(3_000_000, 4096, 2, context=128)
    kind = type(example("top-k"))
    small = ShapeForm(hidden=32, layers=3, heads=2, experts=8, width=16, active=2, context=64)
    counted = sum(p.numel() for p in model_of(kind(small, {})).parameters())
    assert float(parameters(np.array([[3, 32, 16, 8, 16, 2]], float), 64)[0]) == counted
    with pytest.raises(UsageError, match="smallest model"):
        shape_within(1000, 4096, 2)


def test_a_student_takes_the_bytes_that_it_may(tmp_path):
    asked = {**SMALL, "architecture": "top-k", "bytes": 700_000, "store": "bfloat16", "teacher": "nano", "steps": 2}
    train(asked, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 600_000 < size < 720_000 and load_model(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "top-k"}, "sizes come from nothing"),
        ({"architecture": "rmoe", "start": "nano"}, "trained from nothing"),
        ({"start": "nano", "settings": {"a": 1}}, "none is named"),
        ({"start": "nano", "tokenizer": "nano"}, "a tokenizer of its own"),
        ({"start": "nano", "length": 4000}, "more than 'nano' can see"),
        ({"steps": 2, "bytes": 10, "architecture": "top-k"}, "smallest model"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train({**SMALL, **changes}, tmp_path / "out")


def two_minima(kind, feedback=0.1, steps=3000, rate=0.02):
    """Distance from the minimum of a mean of quadratics, each with a minimum of its own, when one entry of ten is sent."""
    draw = torch.Generator().manual_seed(0)
    minima = 5 * torch.randn(4, 10, generator=draw)
    exchange, x = Exchange(ExchangeForm(share=0.1, feedback=feedback, kind=kind), 10), torch.zeros(10)
    for _ in range(steps):
        x = x - rate * exchange.step([exchange.message(part, x - minima[part]) for part in range(4)])
    return float((x - minima.mean(0)).norm())


def test_controlled_feedback_reaches_the_minimum_that_naive_compression_misses():
    assert two_minima("econtrol") < 1e-3 < 0.5 < two_minima("plain")


def test_everything_sent_is_plain_descent():
    exchange, draw = Exchange(ExchangeForm(share=1.0), 50), torch.Generator().manual_seed(0)
    for _ in range(5):
        gradients = torch.randn(3, 50, generator=draw)
        found = exchange.step([exchange.message(part, gradients[part]) for part in range(3)])
        torch.testing.assert_close(found, gradients.mean(0), atol=1e-6, rtol=1e-5)
    assert exchange.sent == 3 * 50 * 8


def test_an_exchange_goes_on_from_its_state():
    first, draw = Exchange(ExchangeForm(share=0.2), 20), torch.Generator().manual_seed(0)
    steps = torch.randn(6, 2, 20, generator=draw)
    for gradients in steps[:3]:
        first.step([first.message(part, gradients[part]) for part in range(2)])
    second = Exchange(ExchangeForm(share=0.2), 20)
    second.restore(first.state(2, Processes()), 2, Processes())
    for gradients in steps[3:]:
        a, b = (each.step([each.message(part, gradients[part]) for part in range(2)]) for each in (first, second))
        assert torch.equal(a, b)


EXCHANGE = {"parts": 2, "batch": 4, "exchange": {"share": 0.05}}


@pytest.mark.slow
def test_a_training_that_sends_little_goes_on_after_a_stop_to_the_same_losses(tmp_path, monkeypatch):
    from moe_prism.training.loop import Training

    whole = trained(tmp_path / "whole", "top-k", **EXCHANGE)
    facts = whole.to_json()
    assert facts["sent_bytes"] < 0.11 * facts["dense_bytes"]
    own = Training._update
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            Training, "_update", lambda self, r: own(self, r) if self.step < 5 else (_ for _ in ()).throw(KeyboardInterrupt)
        )
        trained(tmp_path / "cut", "top-k", **EXCHANGE)
    assert train(recipe("top-k", **EXCHANGE), tmp_path / "cut", resume=True).curve == whole.curve


@pytest.mark.slow
def test_two_processes_that_send_little_give_what_one_gives_to_the_bit(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe("top-k", **EXCHANGE)))
    one = train(file, tmp_path / "one")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moe_prism"]
    words += ["train", str(file), "-o", str(tmp_path / "two")]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "training.json").read_text())["train"] == one.curve.train


@pytest.mark.slow
def test_experts_of_a_dense_model_are_tuned(tiny_dense, tmp_path):
    from moe_prism.jobs.split import split_model
    from moe_prism.options.split import SplitOptions

    text = CalibrateOptions(domains=["code=domains/python", "prose=domains/prose"], tokens=512, length=32, reservoir=128)
    options = SplitOptions(method="read-me", experts=2, active=1, calibration=text)
    split_model(tiny_dense, tmp_path / "split", options)
    followed = {**SMALL, "start": str(tmp_path / "split"), "teacher": str(tiny_dense), "length": 32, "trained": "experts"}
    found = train({**followed, "rate_matrix": 1e-3, "rate_rest": 1e-4, "steps": 8}, tmp_path / "tuned")
    before, after = (load_model(tmp_path / name).state_dict() for name in ("split", "tuned"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".experts." in name for name in moved) and found.to_json()["shape"]["experts"] == 2


@pytest.mark.slow
def test_experts_that_were_merged_stay_one_while_they_are_trained(plain, text_file, tmp_path):
    from moe_prism.jobs.compress import compress_model
    from moe_prism.options.compress import CompressOptions

    text = CalibrateOptions(text=str(text_file), tokens=256, length=32)
    compress_model(plain, tmp_path / "merged", CompressOptions(method="m-smoe", keep=0.5, calibration=text))
    train({**SMALL, "start": str(tmp_path / "merged"), "teacher": str(plain)}, tmp_path / "tuned")
    groups = [[first_alike(m).tolist() for m in experts_of(load_model(tmp_path / name))] for name in ("merged", "tuned")]
    assert groups[0] == groups[1] and any(len(set(same)) == 2 for same in groups[0])


@pytest.mark.slow
def test_a_model_is_cut_trained_and_cut_again(plain, text_file, tmp_path):
    from moe_prism.jobs.compress import compress_model
    from moe_prism.options.compress import CompressOptions

    text = CalibrateOptions(text=str(text_file), tokens=256, length=32)
    source = plain
    for number, keep in enumerate((0.75, 2 / 3)):
        cut, tuned = tmp_path / f"cut{number}", tmp_path / f"tuned{number}"
        compress_model(source, cut, CompressOptions(method="slim", keep=keep, multiple=1, calibration=text))
        train({**SMALL, "start": str(cut), "teacher": str(plain), "steps": 2}, tuned)
        source = tuned
    assert load_model(source).config.intermediate_size == 4
