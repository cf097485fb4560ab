"""The tutorials of docs/developer: what a newcomer writes is one file and one line, and then every part of the product knows it.

The file and the line are read from the page. The page's commands are run, with less text. Then the new method, policy or family must
pass what the ones in the catalogue pass.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from types import SimpleNamespace

import httpx2
import pytest
import torch
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_prism import registry
from moe_prism.artefact.load import load
from moe_prism.artefact.open import open_model
from moe_prism.catalogue import methods
from moe_prism.compress.prune import LayerSubject, criteria
from moe_prism.errors import UsageError
from moe_prism.jobs.generate import generate
from moe_prism.methods.find import described
from moe_prism.model import find, find_layers
from moe_prism.offload import KeySpace, Moment, Pool, cache_policies
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL, OperatingPoint, RoutingStage, find_point
from moe_prism.routing import Routed, stage_class
from moe_prism.serve.vllm.refusal import refusal
from moe_prism.store import StoreOptions
from tests.generic import checks
from tests.offload import test_policies as policy_tests
from tests.offload.test_pool import machine
from tests.parity.checks import VOCAB, measure
from tests.parity.families import randomise
from tests.serve.house import open_house
from tests.store.common import PROMPT, smallest

from . import tutorial

TOKENS = GenerateOptions(max_tokens=8)
METHOD, CRITERION = "add-a-method.md", "add-a-pruning-criterion.md"
POLICY, FAMILY = "add-a-cache-policy.md", "add-a-model-family.md"


@pytest.fixture
def folder(elastic_tiny, tmp_path, monkeypatch):
    """The folder in which a page's commands run: `elastic` is a refactored model."""
    shutil.copytree(elastic_tiny, tmp_path / "elastic")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def router_share(tmp_path_factory):
    with tutorial.followed(METHOD, tmp_path_factory.mktemp("method"), methods) as name:
        yield name


@pytest.fixture(scope="module")
def gate_rms(tmp_path_factory):
    with tutorial.followed(CRITERION, tmp_path_factory.mktemp("criterion"), methods, criteria) as name:
        yield name


@pytest.fixture(scope="module")
def s3_fifo(tmp_path_factory):
    with tutorial.followed(POLICY, tmp_path_factory.mktemp("policy"), cache_policies) as name:
        yield name


@pytest.fixture(scope="module")
def bench(elastic_tiny, text_file):
    return checks.Bench(elastic_tiny, text_file)


@pytest.mark.parametrize("page", [METHOD, CRITERION, POLICY, FAMILY])
def test_what_a_reader_copies_follows_the_house_rules(page):
    for part in tutorial.parts(page):
        if part.place.startswith(tutorial.SOURCE) and "class " in part.code:
            tutorial.follows_the_house_rules(part)


@pytest.mark.parametrize("page", [METHOD, CRITERION, POLICY])
def test_it_is_one_file_and_one_line(page):
    file, line = tutorial.parts(page)
    assert "class " in file.code and len(line.code.strip().splitlines()) == 1


@pytest.mark.parametrize(("page", "acts"), [(METHOD, "routing"), (CRITERION, "weights")])
def test_the_file_works_from_another_package_too(page, acts, tmp_path, monkeypatch):
    """As an entry point, with no line of ours changed."""
    file, line = tutorial.parts(page)
    ((name, entry),) = tutorial.entries(line).items()
    point = SimpleNamespace(name=f"my-{name}", value=entry.target, dist=SimpleNamespace(name="another-package"))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "moe_prism.method" else [])
    with tutorial.placed(file, tmp_path):
        assert point.name in methods.names(acts)
        row = next(row for row in described() if row.name.endswith(point.name))
        assert (row.acts, row.origin) == (acts, "another-package")


def test_a_new_method_passes_the_generic_checks(router_share, bench, tmp_path):
    asked = checks.asked_for(router_share)
    wanted = checks.checks_of(router_share)
    assert checks.is_exact_at_its_neutral_values in wanted and checks.is_the_same_alone_and_beside_any_other in wanted
    for check in wanted:
        check(bench, asked)
    checks.runs_again_from_its_file(bench, [asked], tmp_path / "frontier.json")


def test_router_share_keeps_the_fewest_experts_whose_probabilities_reach_p(router_share):
    """Against a loop over tokens; p of 1 and a count below k are its limits."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 6, generator=draw).softmax(1)
    weight, index = scores.topk(4)
    for p, most in ((0.3, 4), (0.5, 4), (0.55, 2), (1.0, 4), (1.0, 3), (0.0, 4)):
        stage = RoutingStage(layers=(most,), stage=router_share, parameters={"p": ((p,),)}, keep_mass=False)
        routed = Routed(torch.zeros(40, 1), index, weight, 0, 6, 6, scores=lambda: scores)
        found = stage_class(router_share)([stage])(routed, 0)
        for t in range(40):
            total, kept = 0.0, []
            for expert, probability in zip(index[t].tolist(), weight[t].tolist(), strict=True):
                if (total < p or not kept) and len(kept) < most:
                    kept.append(expert)
                total += probability
            assert found.index[t].tolist() == kept + [-1] * (4 - len(kept))
        assert (found is routed) == (p == 1 and most == 4)


@pytest.mark.slow
def test_a_new_method_is_listed_measured_generated_and_served(router_share, folder, text_file, capsys):
    """The page's commands; then the server, with requests of both methods in one batch, in memory and from the store."""
    listed, skipped, measured, generated, stored, served = tutorial.commands(METHOD)
    rows = {row["name"]: row for row in tutorial.answer(listed, text_file, capsys)["entries"]}
    assert (rows[router_share]["acts"], rows[router_share]["served_by"]) == ("routing", "generate, serve, vLLM")
    tutorial.run(skipped, text_file)
    plan = json.loads((folder / "plan.json").read_text())
    assert refusal(OperatingPoint.from_json(plan["point"])) is None  # vLLM takes it as well
    assert plan["point"]["routing"][0]["stage"] == router_share and plan["made"]["mean"] == pytest.approx(1.5, abs=0.1)
    points = {row["name"]: row for row in tutorial.answer(measured, text_file, capsys)["points"]}
    mine, other = served[served.index("--points") + 1].split(",")
    assert points[mine]["rule"] == router_share and points[other]["rule"] == "threshold" and points[mine]["kl"] > 0
    text = tutorial.answer(generated, text_file, capsys)["text"]
    assert tutorial.answer(stored, text_file, capsys)["text"] == text

    model, tokenizer = load("elastic")
    named = {name: find_point(name, "elastic").point for name in (mine, other)} | {"full": FULL}
    alone = {n: generate(model, tokenizer, PROMPT, point=point, sampling=TOKENS).text for n, point in named.items()}
    whole, _ = load("elastic", store=StoreOptions(1 << 30))
    for store in (None, StoreOptions(smallest(whole, 6), ahead=2)):
        with open_house(folder / "elastic", points=(mine, other), store=store) as house:
            assert [level.name for level in house.built.service.ladder.levels] == [*named]
            for name, found in zip(named, asyncio.run(_together(house, [*named])), strict=True):
                assert found["choices"][0]["text"] == alone[name], name
                assert found["moe_prism"]["point"] == name


async def _together(house, names):
    async def ask(client, name):
        body = {"model": f"tiny@{name}", "prompt": PROMPT, "max_tokens": TOKENS.max_tokens, "temperature": 0, "ignore_eos": True}
        return (await client.post(f"{house.url}/completions", json=body)).json()

    async with httpx2.AsyncClient(timeout=60) as client:
        return await asyncio.gather(*(ask(client, name) for name in names))


def test_a_new_criterion_passes_the_generic_checks(gate_rms, bench, tmp_path):
    asked = checks.asked_for(gate_rms)
    for check in checks.checks_of(gate_rms):
        check(bench, asked)
    checks.runs_again_from_its_file(bench, [asked], tmp_path / "frontier.json")


@pytest.mark.slow
def test_a_new_criterion_is_listed_measured_generated_and_written(gate_rms, folder, text_file, capsys):
    """A point that changes the weights is refused by the server by name; the checkpoint that `prune` writes is what it serves."""
    listed, measured, generated, pruned, again, _ = tutorial.commands(CRITERION)
    name = f"prune:{gate_rms}"
    assert name in [row["name"] for row in tutorial.answer(listed, text_file, capsys)["entries"]]
    points = {row["name"]: row for row in tutorial.answer(measured, text_file, capsys)["points"]}
    asked = generated[generated.index("--point") + 1]
    assert points[asked]["rule"] == name and points[asked]["kl"] > 0
    tutorial.answer(generated, text_file, capsys)
    tutorial.run(pruned, text_file)
    tutorial.answer(again, text_file, capsys)
    assert open_model("smaller").elastic.layers[0].parts.layer.num_experts == 2
    with (
        pytest.raises(UsageError, match=f"'{asked}' cannot be served here: it changes the weights"),
        open_house(folder / "elastic", points=(asked,)),
    ):
        pass
    with open_house(folder / "smaller") as house:
        model, tokenizer = load("smaller")
        ((found),) = asyncio.run(_together(house, ["full"]))
        assert found["choices"][0]["text"] == generate(model, tokenizer, PROMPT, sampling=TOKENS).text


def test_gate_rms_is_the_root_mean_square(gate_rms):
    values = {"outputs": {"gated_sq": torch.tensor([8.0, 0.0, 9.0]), "count": torch.tensor([2, 0, 1])}}
    scores = criteria.get(gate_rms)().scores(LayerSubject(0, "layer", 3, 1, values, torch.zeros(3, dtype=torch.bool)))
    assert scores.tolist() == [2.0, 0.0, 3.0]


@pytest.mark.parametrize("sizes", [False, True])
def test_a_new_policy_keeps_the_laws_of_the_pool(s3_fifo, sizes):
    case = machine(s3_fifo, sizes).TestCase
    case.settings = policy_tests.settings(max_examples=25, stateful_step_count=40, deadline=None)
    case().runTest()


def test_a_new_policy_is_below_the_bound_and_deterministic(s3_fifo):
    policy_tests.test_same_seed_same_counts(s3_fifo)
    policy_tests.test_nothing_is_above_belady()  # takes its names from the registry


def test_a_new_policy_is_listed_runs_a_store_and_is_replayed(s3_fifo, folder, text_file, capsys):
    listed, stored, traced, replayed = tutorial.commands(POLICY)
    assert s3_fifo in [row["name"] for row in tutorial.answer(listed, text_file, capsys)["entries"]]
    model, tokenizer = load("elastic")
    assert tutorial.answer(stored, text_file, capsys)["tokens"] == 4
    whole, _ = load("elastic", store=StoreOptions(1 << 30))
    small, _ = load("elastic", store=StoreOptions(smallest(whole, 5), policy=s3_fifo))
    found = generate(small, tokenizer, PROMPT, sampling=TOKENS)
    assert found.text == generate(model, tokenizer, PROMPT, sampling=TOKENS).text
    cache = small._moe_prism.store.cache
    assert cache.counts.evictions > 0
    tutorial.run(traced, text_file)
    tutorial.run(replayed, text_file)
    assert s3_fifo in (folder / "misses.html").read_text()


def test_a_scan_leaves_the_main_queue_of_s3_fifo_alone(s3_fifo):
    """What the page says: many keys that are wanted once do not drive out those that are wanted again."""
    space = KeySpace(1, 40)
    hits = {}
    for name in (s3_fifo, "lru"):
        pool = Pool(5, cache_policies.get(name)(space, 5))
        for clock, key in enumerate([0, 1, 2, 3] * 3 + list(range(10, 40)) + [0, 1, 2, 3]):
            pool.request([key], Moment(clock, clock, 0))
        hits[name] = pool.counts.hits
    assert (hits[s3_fifo], hits["lru"]) == (12, 8)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """(experts class of the family, layer class of the tutorial), with the tutorial done."""
    modelling, file, imported, line = tutorial.parts(FAMILY)
    own: dict = {"__name__": "modeling_stacked"}
    exec(modelling.code, own)
    with tutorial.placed(file, tmp_path) as module:
        names: dict = {"__name__": "moe_prism.model.find", "__package__": "moe_prism.model"}
        exec(imported.code, names)
        monkeypatch.setattr(find, "FORMS", (*find.FORMS, *eval(f"[{line.code}]", names)))
        yield own["StackedExperts"], module.StackedLayer


@torch.no_grad()
def stacked_model(experts: type[nn.Module]) -> nn.Module:
    """A tiny model of which only the experts are of the family."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2)).float().eval()
    for block in model.model.layers:
        block.mlp.experts = experts(8, 32, 16)
    randomise(model)
    return model


def test_a_new_family_passes_parity(family):
    experts, layer = family
    model = stacked_model(experts)
    assert [type(found) for found in find_layers(model)] == [layer] * 2
    result = measure(model)
    assert not result.problems and result.layers == 2 and result.spread >= 1 and result.scores == "softmax"


def test_a_family_that_was_read_wrong_is_refused(family, monkeypatch):
    experts, layer = family
    monkeypatch.setattr(layer, "activate", lambda self, gate, up: self.module.act_fn(up) * gate)
    with pytest.raises(UsageError, match="its output is not weight"):
        find_layers(stacked_model(experts))


def test_without_the_line_the_family_is_refused_by_name():
    own: dict = {"__name__": "modeling_stacked"}
    exec(tutorial.parts(FAMILY)[0].code, own)
    with pytest.raises(UsageError, match=r"'model\.layers\.0\.mlp' .* holds experts in an unknown form"):
        find_layers(stacked_model(own["StackedExperts"]))
