"""One frontier of all per-token methods, run again by name: in memory, from the store, and by the server, all in one batch."""

import asyncio
import json
import shutil

import httpx2
import pytest

from moe_prism.artefact.load import load
from moe_prism.catalogue import methods
from moe_prism.elastic.bind import leaves_out_neurons, multiplies_inside
from moe_prism.errors import UsageError
from moe_prism.jobs.frontier import ALL_PER_TOKEN, expanded, measure_frontier
from moe_prism.jobs.generate import generate
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import find_point
from moe_prism.store import StoreOptions
from tests.serve.house import open_house
from tests.store.common import PROMPT, smallest

TOKENS = GenerateOptions(max_tokens=10)
KEEP_ALL = ("rewiring", "graph", "attention-graph")
"""Methods that choose other experts, and as many."""
ON_THE_BATCH = ("batch-redistribution:uniform", "batch-blocks")


OF_EACH_KIND = (
    "product", "threshold", "bits", "mass", "uniform", "score-mass", "top-p", "weight-cutoff", "gate-threshold", "rewiring",
)  # fmt: skip
"""Rules, slots of several widths, skip plans, stages by token, neurons left out, and other experts instead."""


@pytest.fixture(scope="session", params=[OF_EACH_KIND, pytest.param((), marks=pytest.mark.slow)], ids=["of each kind", "every"])
def wanted(request):
    """The per-token methods that are looked at."""
    return request.param or tuple(expanded(ALL_PER_TOKEN))


@pytest.fixture(scope="session")
def measured(shared, elastic_tiny, text_file, wanted):
    """The tiny elastic model with the frontier of per-token methods, one of expert pruning, and those that depend on the batch."""

    def build(folder):
        shutil.copytree(elastic_tiny, folder)
        names = (*wanted, "prune:soft-count", *ON_THE_BATCH)
        options = FrontierOptions(text=str(text_file), methods=names, tokens=256, length=32, calibration_tokens=256, per_method=3)
        measure_frontier(folder, options).save(folder / "frontier.json")

    return shared(f"elastic-tiny-measured-{len(wanted)}", build)


@pytest.fixture(scope="module")
def names(measured):
    """A point of every per-token method, by the name it has in frontier.json; the cheapest that is not the whole model."""
    rows = json.loads((measured / "frontier.json").read_text())["points"]
    found = {}
    for row in rows:
        if (row["budget"] < 1 or row["rule"] in KEEP_ALL) and row["rule"] in expanded(ALL_PER_TOKEN):
            found.setdefault(row["rule"], row["name"])
    return found


@pytest.fixture(scope="module")
def alone(measured, names):
    """Greedy tokens of each point by itself, in memory."""
    model, tokenizer = load(measured)
    return {
        name: generate(model, tokenizer, PROMPT, point=find_point(name, measured).point, sampling=TOKENS).text
        for name in names.values()
    }


def test_every_method_that_is_wanted_has_a_point(names, wanted):
    assert set(names) == set(wanted)


def test_twelve_methods_or_more():
    others = {name for name in methods.names() if getattr(methods.get(name), "depends_on_batch", False)}
    assert others >= {name.partition(":")[0] for name in ON_THE_BATCH}
    every = expanded(ALL_PER_TOKEN)
    assert len(every) >= 12 and set(every) == {*methods.names("slots"), *methods.names("routing")} - others


@pytest.mark.parametrize("slots", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_from_the_store_every_point_gives_the_tokens_of_the_model_in_memory(measured, names, alone, tmp_path, slots):
    whole, _ = load(measured, store=StoreOptions(1 << 30, tmp_path / "pack"))
    memory = smallest(whole, slots)
    model, tokenizer = load(measured, store=StoreOptions(memory, tmp_path / "pack", ahead=3))
    for name in names.values():
        point = find_point(name, measured).point
        if point.slots.bits is not None:
            with pytest.raises(UsageError, match="records hold no slots of several widths"):
                generate(model, tokenizer, PROMPT, point=point, sampling=TOKENS)
            continue
        if leaves_out_neurons(point) or multiplies_inside(point):
            with pytest.raises(UsageError, match="not computed where this model's experts are"):
                generate(model, tokenizer, PROMPT, point=point, sampling=TOKENS)
            continue
        assert generate(model, tokenizer, PROMPT, point=point, sampling=TOKENS).text == alone[name], name


def longest_ladder(rows):
    """The names of the longest chain of points that rise in slots and quality; of equally long ones, that of most methods."""
    rows = sorted(
        (r for r in rows if r["budget"] < 1 and r["top1_agreement"] < 1), key=lambda r: (r["k_slots"], r["top1_agreement"])
    )
    best = []
    for i, row in enumerate(rows):
        before = [
            chain for chain, last in zip(best, rows[:i], strict=True)
            if last["k_slots"] < row["k_slots"] and last["top1_agreement"] < row["top1_agreement"]
        ]  # fmt: skip
        best.append([*max(before, key=lambda c: (len({r["rule"] for r in c} | {row["rule"]}), len(c)), default=[]), row])
    return [row["name"] for row in max(best, key=lambda c: (len({r["rule"] for r in c}), len(c)))]


@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_d02_the_server_mixes_points_of_all_methods_in_one_batch(measured, tmp_path, stored):
    """Every request's tokens are those of its point alone; the answer says which point that was."""
    rows = json.loads((measured / "frontier.json").read_text())["points"]
    per_token = [row for row in rows if row["rule"] in expanded(ALL_PER_TOKEN)]
    slots = max(row["k_slots"] for row in rows)  # a point that keeps all of them, in fewer bits, is no level beside the full one
    fit = [r for r in per_token if not (r["point"]["slots"]["bits"] and (stored or r["k_slots"] == slots))]
    neurons = ("gate-threshold", "blocks-and-neurons")  # not computed from a store
    mine = longest_ladder([r for r in fit if not (r["rule"] in neurons and (stored or r["k_slots"] == slots))])
    model, tokenizer = load(measured)
    points = {name: find_point(name, measured).point for name in mine}
    assert len(mine) >= 6 and len({row["rule"] for row in rows if row["name"] in mine}) >= 4
    alone = {name: generate(model, tokenizer, PROMPT, point=point, sampling=TOKENS).text for name, point in points.items()}
    store = StoreOptions(120_000, tmp_path / "pack", ahead=2) if stored else None
    engine = {"engine": {"process": False, "requests": 16, "step_tokens": 256, "cache_tokens": 8192, "page": 16}}
    with open_house(measured, engine, points=tuple(mine), store=store) as house:

        async def ask(client, name):
            body = {
                "model": f"tiny@{name}",
                "prompt": PROMPT,
                "max_tokens": TOKENS.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            return (await client.post(f"{house.url}/completions", json=body)).json()

        async def together():
            async with httpx2.AsyncClient(timeout=60) as client:
                return await asyncio.gather(*(ask(client, name) for name in mine))

        answers = asyncio.run(together())
        models = httpx2.get(f"{house.url}/models").json()["data"][0]["operating_points"]
    for name, answer in zip(mine, answers, strict=True):
        assert answer["choices"][0]["text"] == alone[name], name
        assert answer["moe_prism"]["point"] == name
        point = points[name].to_json()
        assert answer["moe_prism"]["points"][name] == point
        assert next(row for row in models if row["name"] == name)["point"] == point


@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_depends_on_the_batch_is_served_where_it_is_named(measured, tmp_path, stored):
    """From memory and from the store; a request that is alone has the tokens of `generate`. Unnamed, no such point is a level."""
    rows = json.loads((measured / "frontier.json").read_text())["points"]
    name = next(row["name"] for row in rows if row["rule"] == "batch-blocks" and 0.3 < row["budget"] < 1)
    model, tokenizer = load(measured)
    alone = generate(model, tokenizer, PROMPT, point=find_point(name, measured).point, sampling=TOKENS).text
    store = StoreOptions(120_000, tmp_path / "pack") if stored else None
    with open_house(measured, points=(name,), store=store) as house:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "temperature": 0, "ignore_eos": True, "quality": name}
        answer = httpx2.post(f"{house.url}/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] == alone and answer["moe_prism"]["point"] == name
    if not stored:
        with open_house(measured) as house:
            levels = httpx2.get(f"{house.url}/models").json()["data"][0]["operating_points"]
        batch = {row["name"] for row in rows if row["rule"] in ON_THE_BATCH}
        assert len(levels) > 1 and not batch & {level["name"] for level in levels}


def test_what_cannot_be_served_is_refused_by_name(measured, tmp_path):
    pruned = next(
        row["name"] for row in json.loads((measured / "frontier.json").read_text())["points"] if row["rule"].startswith("prune")
    )
    with (
        pytest.raises(UsageError, match=f"'{pruned}' cannot be served here: it changes the weights"),
        open_house(measured, points=(pruned,)),
    ):
        pass
