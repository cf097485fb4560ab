"""Rewiring: vectors on the router's logits, fitted to one text and forgotten with it."""

from __future__ import annotations

import json

import pytest
import torch

import moe_prism
from moe_prism import cli
from moe_prism.artefact.open import open_model
from moe_prism.errors import UsageError
from moe_prism.methods.skip.rewiring import Rewire, Rewiring, rewire
from moe_prism.options.generate import TunedOptions
from moe_prism.point import OperatingPoint, RoutingStage
from moe_prism.routing.base import Routed

PROMPT = "import os\nimport sys\n\n\ndef main(args):\n    for name in args:\n        print(name)\n"


@pytest.fixture(scope="module")
def opened(elastic_tiny):
    return open_model(elastic_tiny)


def prompt(opened, text=PROMPT):
    return opened.tokenizer(text, return_tensors="pt").input_ids


@pytest.mark.parametrize("normalised", [False, True])
def test_the_best_of_the_shifted_logits_are_taken_with_the_routers_weights(normalised):
    g = torch.Generator().manual_seed(0)
    logits, delta = torch.randn(6, 5, generator=g), torch.tensor([2.0, -1.0, 0.0, 0.5, -2.0])
    scores = logits.softmax(1)
    weight, index = scores.topk(2, 1)
    weight = weight / weight.sum(1, keepdim=True) if normalised else weight * 2.5  # a family's factor
    stage = Rewire(
        [RoutingStage(layers=(2,), stage="rewiring", parameters={"delta": (tuple(delta.tolist()),)}, keep_mass=normalised)]
    )
    found = stage(Routed(torch.zeros(6, 4), index, weight, 0, 5, 5, scores=lambda: scores))
    for t in range(6):
        new = (logits[t] + delta).softmax(0)
        best = new.argsort(descending=True)[:2]
        assert found.index[t].tolist() == best.tolist()
        want = new[best] / new[best].sum() if normalised else new[best] * 2.5
        torch.testing.assert_close(found.weight[t], want)


def test_no_steps_are_the_model_and_steps_lower_the_loss_of_the_text(opened):
    ids, elastic = prompt(opened), opened.elastic
    before = [p.requires_grad for p in opened.model.parameters()]
    none = rewire(opened.model, elastic, ids, Rewiring(steps=0))
    assert none.stage is None and none.after == none.before
    with torch.no_grad():
        plain = opened.model(ids).logits
    done = rewire(opened.model, elastic, ids, Rewiring(steps=8, share=1.0))
    assert done.stage is not None and done.held_after < done.held_before and done.layers == (0, 1)
    assert [p.requires_grad for p in opened.model.parameters()] == before
    assert all(abs(v) <= 1 for row in done.stage.parameters["delta"] for v in row)
    with torch.no_grad(), moe_prism.operating_point(opened.model, point=OperatingPoint(routing=(done.stage,))):
        logits = opened.model(ids).logits
    split = ids.shape[1] - round(0.2 * ids.shape[1])
    each = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    assert float(each[split - 1 :].mean()) == pytest.approx(done.held_after, rel=1e-4)  # the stage is what was fitted
    with torch.no_grad():
        assert torch.equal(opened.model(ids).logits, plain)  # nothing stays


def test_the_order_of_requests_changes_nothing(opened):
    one, other = prompt(opened), prompt(opened, "class Foo:\n    def bar(self, x, y, z):\n        return x + y + z\n")
    alone = rewire(opened.model, opened.elastic, other, Rewiring(steps=2))
    rewire(opened.model, opened.elastic, one, Rewiring(steps=2))
    assert rewire(opened.model, opened.elastic, other, Rewiring(steps=2)) == alone


def test_a_share_of_the_layers_gets_vectors_and_both_ends_can_be_taken(opened):
    ids = prompt(opened)
    least, most = (rewire(opened.model, opened.elastic, ids, Rewiring(steps=0, share=0.5, sure=sure)) for sure in (False, True))
    assert len(least.layers) == len(most.layers) == 1 and least.layers != most.layers


def test_what_cannot_be_fitted_is_refused(opened):
    with pytest.raises(UsageError, match="too short"):
        rewire(opened.model, opened.elastic, prompt(opened)[:, :9], Rewiring())
    with pytest.raises(UsageError, match="0 to 1000 steps"):
        Rewiring(share=0).check()
    with pytest.raises(UsageError, match="belong to --rewire"):
        TunedOptions(rewire_share=0.5).check()
    with pytest.raises(UsageError, match="for 3 experts"):
        stage = RoutingStage(layers=(2, 2), stage="rewiring", parameters={"delta": ((1.0, 0.0, 0.0), (0.0,))})
        with moe_prism.operating_point(opened.model, point=OperatingPoint(routing=(stage,))):
            opened.model(prompt(opened))


def test_generate_rewires_each_prompt_and_its_point_runs_again(elastic_tiny, tmp_path, capsys):
    asked = ["generate", str(elastic_tiny), "--prompt", PROMPT, "--max-tokens", "6", "--json"]
    assert cli.main([*asked, "--rewire", "6", "--rewire-share", "1", "--budget", "0.5"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["rewired"]["steps"] > 0 and made["rewired"]["layers"] == [0, 1] and made["budget"] == 0.5
    assert [stage["stage"] for stage in made["point"]["routing"]] == ["rewiring"]
    (tmp_path / "point.json").write_text(json.dumps(made["point"]))
    assert cli.main([*asked, "--point", str(tmp_path / "point.json")]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == made["text"]
    assert cli.main([*asked, "--rewire", "0"]) == 0
    assert "rewired" not in json.loads(capsys.readouterr().out)
