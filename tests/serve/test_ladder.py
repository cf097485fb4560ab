"""Which operating points are served: points of any method, chosen or by default, files of version 0.1, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil

import httpx2
import pytest
import torch

import moe_prism
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.runtime import slots_per_token
from moe_prism.errors import UsageError
from moe_prism.jobs.frontier import measure_frontier
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.generate import GenerateOptions
from moe_prism.options.serve import ServeOptions
from moe_prism.point import FULL, OperatingPoint, RoutingStage, SlotRule, WeightChange
from moe_prism.schedule.base import Level
from moe_prism.serve.engine.ladder import climb, find_ladder
from moe_prism.serve.engine.start import _refusal
from tests.serve.house import open_house

SKIP = OperatingPoint(routing=(RoutingStage(layers=(1, 1), keep_mass=True),))
BATCH = OperatingPoint(
    routing=(RoutingStage(stage="batch-redistribution", layers=(1, 1), parameters={"base": ((1.0,), (1.0,))}, keep_mass=True),)
)
PRUNED = OperatingPoint(weights=WeightChange(change="prune"))


def row(name, point, slots, kl, rule="given point"):
    """An entry of frontier.json; point None: as version 0.1 wrote it."""
    numbers = {"ppl": 2.0, "kl": kl, "active_expert_params": slots, "active_expert_bytes": slots, "flops_per_token": slots}
    own = {} if point is None else {"point": point.to_json()}
    agreement = {"top1_agreement": 1 - kl, "pareto": False, "budget": slots / 16, "k_slots": slots}
    return {**numbers, **agreement, **own, "name": name, "rule": rule}


def write(folder, *rows):
    data = {"model": "m", "source": "s", "n_sub": 4, "points": list(rows), "baseline_topk": [], "provenance": {}}
    (folder / "frontier.json").write_text(json.dumps(data))
    return folder


def allowed(point):
    return "the engine is tired" if point.slots.scorer == "gates" else None


def names(ladder):
    return [level.name for level in ladder.levels]


@pytest.fixture
def folder(tmp_path):
    return write(
        tmp_path,
        row("threshold-4", FULL.with_budget(0.25), 4.0, 0.3, "threshold"),
        row("skip-6", SKIP, 6.0, 0.2),
        row("product-7", FULL.with_budget(7 / 16, "product"), 7.0, 0.25, "product"),  # dearer and worse than the skip plan
        row("pattern-8", FULL.with_budget(0.5, "pattern"), 8.0, 0.1, "pattern"),
        row("batch-9", BATCH, 9.0, 0.05),
        row("blocks-9.5", FULL.with_budget(9.5 / 16, "batch-blocks"), 9.5, 0.04, "batch-blocks"),
        row("pruned", PRUNED, 10.0, 0.01),
        row("full", FULL, 16.0, 0.0, "product"),
    )


def test_the_best_points_of_all_methods_are_served_and_the_others_are_named(folder, caplog):
    with caplog.at_level(logging.INFO, logger="moe_prism.serve.engine.ladder"):
        ladder, source = find_ladder(folder, 16, allowed)
    assert source == "frontier.json" and names(ladder) == ["threshold-4", "skip-6", "full"]
    assert ladder.levels[1] == Level("skip-6", SKIP, 6.0, 0.8)
    for name, words in (
        ("pattern-8", "the engine is tired"),
        ("batch-9", "what a token"),
        ("blocks-9.5", "what a token"),
        ("pruned", ""),
    ):
        assert f"{name} is not served: {words}" in caplog.text


def test_points_are_chosen_by_name(folder, caplog):
    ladder, _ = find_ladder(folder, 16, allowed, ["threshold-4", "batch-9", "blocks-9.5"])
    assert names(ladder) == ["threshold-4", "batch-9", "blocks-9.5", "full"]
    assert caplog.text.count("depends on the other tokens") == 2
    assert names(find_ladder(folder, 16, allowed, ["product-7"])[0]) == [
        "product-7",
        "full",
    ]  # though the frontier has better ones
    assert names(find_ladder(folder, 16, allowed, ["full"])[0]) == ["full"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["pattern-8"], "'pattern-8' cannot be served here: the engine is tired"),
        (["threshold-4", "pruned"], "'pruned' cannot be served here: it changes the weights"),
        (["threshold-5"], "did you mean 'threshold-4'"),
        (["missing.json"], "there is no missing.json"),
        (["a.json", "threshold-4"], "by file and by name"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(folder, asked, words):
    with pytest.raises(UsageError) as found:
        find_ladder(folder, 16, allowed, asked)
    assert words in str(found.value)


def test_points_of_another_frontier(folder, tmp_path):
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", row("mine", SKIP, 6.0, 0.2))
    file = tmp_path / "other" / "frontier.json"
    ladder, source = find_ladder(folder, 16, allowed, [str(file)])
    assert source == "frontier.json" and names(ladder) == ["mine", "full"]


def test_another_frontier_is_read_as_the_folders_own(folder, tmp_path, caplog):
    """Every frontier holds points that cannot share a batch, the baselines of bits among them: they are left out by name."""
    whole = [str(folder / "frontier.json")]
    ladder, _ = find_ladder(tmp_path / "elsewhere", 16, allowed, whole)
    assert names(ladder) == names(find_ladder(folder, 16, allowed)[0])
    assert "pattern-8 is not served: the engine is tired" in caplog.text
    with pytest.raises(UsageError, match=r"no operating point of .*frontier\.json can be a level here"):
        find_ladder(folder, 16, lambda point: "no", whole)


def test_files_of_version_0_1(tmp_path):
    """Budgets of the threshold rule in ladder.json; points that are told by their rule and budget in frontier.json."""
    (tmp_path / "ladder.json").write_text(json.dumps({"levels": [{"name": "x", "budget": 0.5, "slots": 8.0, "quality": 0.9}]}))
    ladder, source = find_ladder(tmp_path, 16, allowed)
    assert source == "ladder.json" and ladder.levels[0] == Level("x", FULL.with_slots(0.5), 8.0, 0.9)
    write(tmp_path, row("linear-4", None, 4.0, 0.3, "linear"), row("ser-6", None, 6.0, 0.2, "ser"))
    ladder, source = find_ladder(tmp_path, 16, allowed)
    assert names(ladder) == ["linear-4", "full"]
    assert ladder.levels[0].point == OperatingPoint(slots=SlotRule(budget=0.25, rule="whole-experts"))
    with pytest.raises(UsageError, match=r"'ser-6' cannot be served here: .*measure it again"):
        find_ladder(tmp_path, 16, allowed, ["ser-6"])


def test_a_ladder_is_written_and_read_as_it_is(tmp_path):
    ladder = climb([Level("a", SKIP, 4.0, 0.8), Level("b", FULL.with_budget(0.5, "product"), 8.0, 0.9)], 16)
    rows = {"levels": [level.to_json() for level in ladder.levels[:-1]]}
    (tmp_path / "ladder.json").write_text(json.dumps(rows))
    assert find_ladder(tmp_path, 16, allowed)[0] == ladder


@torch.no_grad()
def test_points_of_several_methods_are_found_and_share_a_batch(elastic_tiny, text_file, tmp_path):
    """What `frontier` measured is what a server offers, and every token of a mixed batch is as alone."""
    asked = ("threshold", "product", "uniform", "ser", "pattern")
    options = FrontierOptions(text=str(text_file), tokens=128, length=32, calibration_tokens=128, methods=asked, per_method=3)
    result = measure_frontier(elastic_tiny, options)
    result.save(tmp_path / "frontier.json")
    model, _ = moe_prism.load(elastic_tiny)
    elastic = model._moe_prism
    ladder, _ = find_ladder(tmp_path, slots_per_token(elastic), _refusal(elastic))
    assert {level.name for level in ladder.levels[:-1]} <= {p.name for p in result.points if not p.point.is_full}
    every = [p.point for p in result.points]
    ids = torch.randint(0, 1000, (len(every), 12), generator=torch.Generator().manual_seed(0))
    with elastic.at(Step(bind(elastic, every), torch.arange(len(every)).repeat_interleave(12))):
        mixed = model(input_ids=ids).logits
    for i, point in enumerate(every):
        with elastic.at([point]):
            alone = model(input_ids=ids[i : i + 1]).logits[0]
        torch.testing.assert_close(mixed[i], alone, rtol=1e-5, atol=1e-5)


def test_a_server_of_points_of_several_methods(tiny_levels, tmp_path):
    """/v1/models carries the points; each request gets the tokens of `generate` at its own."""
    copy = tmp_path / "elastic"
    shutil.copytree(tiny_levels, copy)
    rows_ = [row("quarter", FULL.with_budget(0.25, "product"), 2.0, 0.3), row("skip", SKIP, 4.0, 0.2)]
    write(copy, *rows_, row("half", FULL.with_budget(0.75), 6.0, 0.1))
    model, tokenizer = moe_prism.load(copy)
    with open_house(copy) as house, httpx2.Client(base_url=house.root, timeout=60) as web:
        card = web.get("/v1/models").json()["data"][0]
        offered = {p["name"]: OperatingPoint.from_json(p["point"]) for p in card["operating_points"]}
        assert offered["skip"] == SKIP and list(offered) == ["quarter", "skip", "half", "full"]
        for name, point in offered.items():
            body = {"prompt": "import os\n", "max_tokens": 6, "temperature": 0, "quality": name}
            answer = web.post("/v1/completions", json=body).json()
            assert answer["moe_prism"]["point"] == name
            made = moe_prism.generate(model, tokenizer, "import os\n", point=point, sampling=GenerateOptions(max_tokens=6))
            assert answer["choices"][0]["text"] == made.text


def test_a_point_that_this_model_cannot_run_is_refused_at_the_start(tiny_levels, tmp_path):
    copy = tmp_path / "elastic"
    shutil.copytree(tiny_levels, copy)
    write(copy, row("nine", OperatingPoint(routing=(RoutingStage(layers=(1, 9)),)), 4.0, 0.2))
    with (
        pytest.raises(UsageError, match="'nine' cannot be served here: layer 1 of the routing stage keeps 9 experts"),
        open_house(copy, points=("nine",)),
    ):
        pass


@pytest.mark.slow
def test_a_server_within_bytes_per_token_serves_that_point_to_who_says_no_quality(tiny_levels, tmp_path):
    """Points that change the weights read less and share no batch; a request that says a quality gets that."""
    copy = tmp_path / "elastic"
    shutil.copytree(tiny_levels, copy)
    rows_ = [row("quarter", FULL.with_budget(0.25, "product"), 2.0, 0.3), row("half", FULL.with_budget(0.75), 6.0, 0.1)]
    write(copy, *rows_, row("pruned", PRUNED, 3.0, 0.05))
    with open_house(copy, bytes_per_token=4.0) as house, httpx2.Client(base_url=house.root, timeout=60) as web:
        body = {"prompt": "import os\n", "max_tokens": 2, "temperature": 0}
        said = [web.post("/v1/completions", json=body | more).json()["moe_prism"]["point"] for more in ({}, {"quality": "full"})]
        assert said == ["quarter", "full"]
    with pytest.raises(UsageError, match="no measured point reads 1 bytes"), open_house(copy, bytes_per_token=1.0):
        pass
    with pytest.raises(UsageError, match="both choose points"):
        ServeOptions(points=("half",), bytes_per_token=4.0).check()
