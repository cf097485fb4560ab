"""Sub-experts as experts of their own, and training their router: what is exact, what is trained, what is refused."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_prism
from moe_prism import cli
from moe_prism.checkpoint import LayerStream
from moe_prism.compress.reslice.form import Sizes
from moe_prism.compress.reslice.write import ReslicedCheckpoint
from moe_prism.elastic.runtime import experts_per_token
from moe_prism.errors import UsageError
from moe_prism.jobs.recover import RecoverOptions, recover_model
from moe_prism.jobs.reslice import reslice
from moe_prism.model import find_layers, load_model
from moe_prism.model.router import Router
from moe_prism.recover.router import Fewer, RouterJob, k_of, train, trained_names, windows_of
from tests.compress.tiny import IDS, load, logits, relative, save
from tests.tiny_sources import digests

OPTIONS = RecoverOptions(method="router", steps=6, tokens=1024, length=32, rate=1e-2)
ROUTERS = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]
EXACT = {"softmax": 2, "softmax-normalised": 2, "top-k-softmax": 2, "router-bias": 2, "sigmoid-bias": 2, "group-softmax": 2}


@pytest.fixture(scope="module")
def resliced(shared, elastic_tiny):
    return shared("resliced-tiny", lambda out: reslice(elastic_tiny, out))


@pytest.fixture(scope="module")
def trained(shared, resliced):
    return shared("router-tiny", lambda out: recover_model(resliced, out, OPTIONS))


def written(kind, folder, n_sub=2, **how):
    """A family's random model in the new form, without the job around it."""
    from moe_prism.checkpoint import Journal, OutputFolder

    save(kind, folder / "source", **how)
    stream = LayerStream(folder / "source", torch.float32)
    layers = find_layers(stream.model)
    sizes = Sizes(layers[0].num_experts, experts_per_token(stream.model, layers[0]), layers[0].width, n_sub)
    writer = ReslicedCheckpoint(stream, layers, sizes)
    with OutputFolder(folder / "out") as out:
        writer.write(out, Journal(out.work, {}), lambda *_: None)
        out.finish()
    return writer, load(folder / "source"), load(folder / "out")


@pytest.mark.parametrize("kind", EXACT)
def test_all_sub_experts_are_the_source_whatever_the_router_does(kind, tmp_path):
    writer, source, found = written(kind, tmp_path)
    assert writer.factor == EXACT[kind]
    assert relative(logits(found), logits(source)) < 1e-5
    old, new = find_layers(source)[0], find_layers(found)[0]
    assert (new.num_experts, new.width) == (2 * old.num_experts, old.width // 2)


def test_a_sigmoid_that_nobody_divides_needs_no_factor(tmp_path, monkeypatch):
    from tests.compress import tiny

    family, config = tiny.FAMILIES["sigmoid-bias"]
    monkeypatch.setitem(tiny.FAMILIES, "sigmoid-alone", (family, {**config, "norm_topk_prob": False}))
    writer, source, found = written("sigmoid-alone", tmp_path)
    assert writer.factor == 1
    assert relative(logits(found), logits(source)) < 1e-5


def test_a_router_that_scores_groups_by_their_two_best_is_refused(tmp_path):
    with pytest.raises(UsageError, match="would not choose the 2 sub-experts of the experts that it chooses"):
        written("group-sigmoid", tmp_path)


def test_half_precision_is_the_source_to_its_rounding_and_experts_to_the_bit(tmp_path):
    """N a power of two moves only exponents."""
    _, source, found = written("softmax", tmp_path, dtype=torch.bfloat16)
    old, new = find_layers(source)[0], find_layers(found)[0]
    assert torch.equal(new.up, old.up.reshape(new.up.shape))
    assert torch.equal(new.down, 2 * old.down.transpose(1, 2).reshape(16, 8, 32).transpose(1, 2))


def test_the_job_writes_an_ordinary_checkpoint(elastic_tiny, resliced, tmp_path):
    facts = json.loads((resliced / "prism.json").read_text())
    assert facts["kind"] == "resliced"
    assert facts["reslicing"] == {"n_sub": 4, "experts": 16, "experts_per_token": 8, "width": 4, "factor": 4}
    assert moe_prism.verify(resliced)
    source, found = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (elastic_tiny, resliced))
    assert relative(logits(found), logits(source)) < 1e-5
    assert digests(resliced) == digests(reslice(elastic_tiny, tmp_path / "again").folder)


def test_only_router_rows_are_trained(resliced, trained):
    model = load_model(resliced, torch.float32)
    assert trained_names(model, find_layers(model)) == ROUTERS
    (facts,) = json.loads((trained / "prism.json").read_text())["recovery"]
    assert facts["trained"] == ROUTERS and (facts["loss"], facts["curriculum"]) == ("next-token", "rising")
    old, new = (dict(load_model(f, torch.float32).named_parameters()) for f in (resliced, trained))
    assert {name for name in old if not torch.equal(old[name], new[name])} == set(ROUTERS)
    rows = new[ROUTERS[0]].view(4, 4, -1)
    assert not torch.equal(rows[:, 0], rows[:, 1])  # siblings are told apart
    assert moe_prism.verify(trained)


def test_an_interrupted_training_goes_on_to_the_same_bytes(resliced, trained, tmp_path, monkeypatch):
    from moe_prism.recover import router

    monkeypatch.setattr(router, "EVERY", 2)

    @contextmanager
    def stopping(_title):
        def update(done, _total):
            if done == 5:
                raise KeyboardInterrupt

        yield update

    with pytest.raises(KeyboardInterrupt):
        recover_model(resliced, tmp_path / "out", OPTIONS, report=stopping)
    recover_model(resliced, tmp_path / "out", OPTIONS, resume=True)
    assert digests(tmp_path / "out") == digests(trained)


def job(model, **changes):
    ids = torch.randint(3, 60, (10, 16), generator=torch.Generator().manual_seed(2))
    given = {
        "model": model, "ids": ids, "lowest": 2, "highest": 4, "normalises": False, "steps": 8, "loss": "kl", "curriculum": "rising",
        "rate": 1e-2, "seed": 0, "state": {}, "save": lambda *_: None, "report": moe_prism.progress.silent,
    }  # fmt: skip
    return RouterJob(**{**given, **changes})


def test_k_rises_evenly_or_is_drawn_and_windows_take_turns():
    rising = job(None, steps=100, highest=16, lowest=4)
    assert [k_of(rising, s) for s in (0, 25, 50, 75, 99)] == [4, 7, 10, 13, 16]
    drawn = job(None, steps=400, highest=16, lowest=4, curriculum="drawn")
    counts = torch.tensor([k_of(drawn, s) for s in range(400)]).bincount(minlength=17)
    assert int(counts[4:].min()) > 10 and int(counts.sum()) == int(counts[4:].sum())
    for start in (0, 2):  # ten windows, four a step: two steps to a round
        seen = torch.cat([windows_of(rising, start + s) for s in range(2)])
        assert len(torch.unique(seen, dim=0)) == 8


@pytest.mark.parametrize("normalises", [False, True])
def test_fewer_is_what_the_frontier_measures_as_uniform(normalises):
    """K of the router's choice, with the weights that the stage `top-n` gives them."""
    from moe_prism.elastic import attach
    from moe_prism.elastic.bind import Step, bind
    from moe_prism.point import OperatingPoint, RoutingStage
    from tests.compress.tiny import build

    model = build("softmax-normalised" if normalises else "softmax")
    elastic = attach(model, 1)
    assert elastic.normalises() == normalises
    stage = RoutingStage(layers=(1,) * len(elastic.layers), keep_mass=normalises)
    with elastic.at(Step(bind(elastic, [OperatingPoint(routing=(stage,))]))):
        wanted = logits(model)
    few = [Fewer(layer, normalises) for layer in find_layers(model)]
    for one in few:
        one.count = 1
        one.layer.install(one)
    assert relative(logits(model), wanted) < 1e-5


def test_kl_to_the_source_falls_and_the_source_is_the_first_rows(tmp_path):
    _, _, model = written("softmax", tmp_path)
    model = model.float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = train(job(model, steps=1, rate=1e-9, loss="kl"))
    assert set(values) == set(trained_names(model, find_layers(model)))
    assert all(torch.allclose(p, before[name], atol=1e-6) for name, p in model.named_parameters())


def test_what_cannot_be_is_refused_by_name(elastic_tiny, resliced, trained, tiny_source, tmp_path, capsys):
    for folder, words in ((elastic_tiny, "chooses whole experts"), (trained, "trained already")):
        with pytest.raises(UsageError, match=words):
            recover_model(folder, tmp_path / "out", OPTIONS)
    for folder in (resliced, tiny_source):
        with pytest.raises(UsageError):
            reslice(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="--loss belongs to --method router"):
        RecoverOptions(loss="kl").check()
    assert cli.main(["refactor", str(elastic_tiny), "--reslice", "--n-sub", "2", "-o", str(tmp_path / "out")]) == 2
    assert "no option of that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_run(elastic_tiny, tmp_path, capsys):
    out = tmp_path / "resliced"
    assert cli.main(["refactor", str(elastic_tiny), "--reslice", "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == 16
    more = ["--method", "router", "--steps", "1", "--tokens", "256", "--length", "32", "-o", str(tmp_path / "trained")]
    assert cli.main(["recover", str(out), *more, "--dry-run"]) == 0
    assert cli.main(["recover", str(out), *more]) == 0
    assert moe_prism.verify(tmp_path / "trained")


def test_router_rows_are_parameters_of_the_gate_alone():
    from tests.compress.tiny import build

    model = build("sigmoid-bias")
    names = trained_names(model, find_layers(model))
    assert names and all(name.endswith(".mlp.gate.weight") for name in names)  # the selection bias is a buffer
    assert Router(model, find_layers(model)[0]).experts == IDS.new_tensor(8)
