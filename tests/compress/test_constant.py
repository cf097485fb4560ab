"""Constants in the place of experts: the criterion, the edit in memory, the folder in vLLM's form, and what reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_prism.artefact.load import load
from moe_prism.artefact.open import open_model
from moe_prism.calibrate import collectors
from moe_prism.calibrate.base import RoutedBatch
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint.constant import CONFIG_KEY, constant_experts
from moe_prism.compress.changes import change_of
from moe_prism.compress.prune import KeptExperts, LayerSubject, pruned
from moe_prism.compress.prune.change import PruneChange
from moe_prism.compress.prune.constants import Constants
from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.errors import CorruptError, UsageError
from moe_prism.frontier.cost import measured_cost, resident_bytes
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.inspect import inspect_model
from moe_prism.jobs.prune import Pruned, prune_model, select_experts
from moe_prism.jobs.refactor import refactor
from moe_prism.jobs.verify import verify
from moe_prism.methods.find import method
from moe_prism.methods.prune.mone import Mone
from moe_prism.methods.prune.select import PruneOptions
from moe_prism.model import find_layers, load_model
from moe_prism.point import FULL, OperatingPoint
from moe_prism.store import StoreOptions
from tests.tiers import by_night
from tests.tiny_sources import digests

from . import tiny

IDS = torch.arange(3, 67).reshape(4, 16)


def constants(rows: int, hidden: int, seed: int = 0) -> Constants:
    return Constants.of(torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.float()


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def options(text_file) -> PruneOptions:
    calibration = CalibrateOptions(text=str(text_file), tokens=1024, length=32)
    return PruneOptions(criterion="mone", calibration=calibration)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A selection that keeps fewer experts in the first layer than a token uses, and more in the second."""
    choice = {"experts": 4, "groups": None, "masked": False}
    rows = [{**choice, "layer": i, "name": f"layer {i}", "kept": ids} for i, ids in enumerate(([2], [0, 1, 3]))]
    facts = {
        "criterion": "by hand",
        "form": "constant",
        "keep": 0.5,
        "allocation": "layer",
        "protected": [[], []],
        "resident_share": 0.5,
    }
    file = tmp_path_factory.mktemp("kept") / "kept.json"
    file.write_text(json.dumps({**facts, "layers": rows}))
    return file


@pytest.fixture(scope="module")
def result(tiny_source, tmp_path_factory, options, kept) -> Pruned:
    return prune_model(tiny_source, tmp_path_factory.mktemp("constant") / "out", options, kept=kept)


@pytest.fixture(scope="module")
def written(result) -> Path:
    return result.folder


@torch.no_grad()
def test_the_score_is_the_spread_of_the_outputs_times_the_routing_weight_of_a_token(tiny_source):
    layer = find_layers(load_model(tiny_source, torch.float32))[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, layer.hidden, generator=generator)
    index = torch.randint(0, layer.num_experts - 1, (40, 1), generator=generator)  # the last one is never chosen
    weight = torch.rand(40, 1, generator=generator)
    halves = [collectors.get("means")(layer, capacity=1, seed=0) for _ in range(2)]
    for half, part in zip(halves, (slice(0, 15), slice(15, 40)), strict=True):
        half.update(RoutedBatch(x[part], index[part], weight[part], 0, 40))
    halves[0].merge(halves[1].state())
    values = {"means": halves[0].state()}
    none = torch.zeros(layer.num_experts, dtype=torch.bool)
    found = Mone().scores(LayerSubject(0, "", layer.num_experts, 1, values, none))
    for e in range(layer.num_experts - 1):
        mine = index[:, 0] == e
        out = layer.project(e, layer.activations(e, x[mine])).double()
        wanted = out.var(0).sum().sqrt() * weight[mine].sum() / 40
        assert float(found[e]) == pytest.approx(float(wanted), rel=1e-5)
        torch.testing.assert_close(values["means"]["sum"][e] / int(mine.sum()), out.mean(0), rtol=1e-4, atol=1e-6)
    assert float(found[-1]) == 0


@pytest.mark.parametrize("kind", ["softmax", "top-k-softmax", "router-bias", "sigmoid-bias", "group-sigmoid"])
def test_in_memory_a_constant_gives_routing_weight_times_vector_and_goes_again(kind):
    """Against the same model with an experts function that says it the long way."""
    model = tiny.build(kind)
    layers = find_layers(model)
    before = tiny.logits(model)
    chosen = [KeptExperts(x.num_experts, tuple(range(2, x.num_experts)), constants=constants(2, x.hidden)) for x in layers]
    with pruned(model, chosen):
        plain = tiny.logits(model)
    assert torch.equal(tiny.logits(model), before)
    elastic = attach(model, 1)
    point = OperatingPoint(weights=PruneChange(tuple(chosen)).part())
    assert OperatingPoint.from_json(json.loads(json.dumps(point.to_json()))) == point
    with operating_point(model, point=point):
        run = tiny.logits(model)
    elastic.detach()
    assert torch.equal(tiny.logits(model), before)

    def by_hand(layer, choice):
        def function(x, index, weight):
            out = layer.stock(x, index, weight.masked_fill(index < 2, 0))
            for e, vector in enumerate(choice.constants.tensor().float()):
                out = out + (weight * (index == e)).sum(1, keepdim=True) * vector
            return out

        layer.install(function)

    for layer, choice in zip(layers, chosen, strict=True):
        by_hand(layer, choice)
    wanted = tiny.logits(model)
    assert relative(plain, wanted) < 1e-5 and relative(run, wanted) < 1e-5 and relative(wanted, before) > 1e-3


def test_the_folder_is_the_edited_model_and_layers_keep_different_numbers(tiny_source, written, result):
    kept = [1, 3]
    source = load_model(tiny_source, torch.float32)
    with pruned(source, result.selection.choices):
        wanted = logits(source)
    smaller = load_model(written, torch.float32)
    assert [layer.num_experts for layer in find_layers(smaller)] == kept
    assert relative(logits(smaller), wanted) < 1e-5
    assert relative(logits(open_model(written).model), wanted) < 1e-5
    assert {check.name for check in verify(written)} >= {"architecture", "values"}
    assert "4 of 8 experts constant" in (written / "README.md").read_text()
    assert [row["experts"] for row in inspect_model(written)["layers"]] == kept
    assert [row["constants"] for row in inspect_model(written)["layers"]] == [4 - n for n in kept]


def test_what_stays_keeps_its_name_and_its_bytes(tiny_source, written):
    def tensors(folder):
        return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}

    old, new = tensors(tiny_source), tensors(written)
    config = json.loads((written / "config.json").read_text())
    gone = constant_experts(config)
    values = {f"model.layers.{layer}.mlp.experts.{e}.approx_value" for layer, ids in gone.items() for e in ids}
    assert gone and {name for name in new if name not in old} == values
    assert all(torch.equal(new[name], old[name]) for name in new if name in old)
    lost = {name.rpartition(".experts.")[2].split(".")[0] for name in old if name not in new}
    assert lost == {str(e) for ids in gone.values() for e in ids}
    assert config["num_experts"] == json.loads((tiny_source / "config.json").read_text())["num_experts"]


def test_transformers_alone_refuses_the_folder(written):
    """Rather that than random weights in the place of constants."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(written)


def test_constants_are_priced_by_what_a_token_reads_and_what_stays(tiny_source, written, result):
    model = load_model(written, torch.float32)
    elastic, layers = attach(model, 1), find_layers(model)
    step = Step(bind(elastic, [FULL]))
    seen = []
    for layer in elastic.layers:
        layer.on_kept = lambda index, _keep, e=layer.parts.layer.num_experts: seen.append((index < e).sum())
    with elastic.at(step), elastic.count():
        logits(model)
    cost = measured_cost(elastic, step)
    matrices, k = layers[0].parameters_per_expert(), 2
    real = int(sum(seen))
    values = (k * IDS.numel() * len(layers) - real) * layers[0].hidden
    assert values and cost.active_expert_params == pytest.approx((real * matrices + values) / IDS.numel())
    whole = load_model(tiny_source, torch.float32)
    change = PruneChange(tuple(result.selection.choices))
    full, size = attach(whole, 1), elastic.stored_bytes_per_weight
    full.stored_bytes_per_weight = size
    there = resident_bytes(full, Step(bind(full, [OperatingPoint(weights=change.part())])))
    stay, gone = sum(x.num_experts for x in layers), sum(len(x.extra) for x in layers)
    assert there == resident_bytes(elastic, step) == (stay * matrices + gone * layers[0].hidden) * size


@pytest.mark.parametrize("equal", by_night([True, False], False))
def test_an_elastic_folder_stays_elastic(elastic_tiny, tmp_path, options, kept, equal):
    result = prune_model(elastic_tiny, tmp_path / "out", options, kept=None if equal else kept)
    whole, _ = load(elastic_tiny)
    models = [load(tmp_path / "out")[0]]
    assert any(check.name == "side tensors" for check in verify(tmp_path / "out"))
    store = StoreOptions(1 << 30, tmp_path / "pack")
    if equal:
        models.append(load(tmp_path / "out", store=store)[0])
    else:
        with pytest.raises(UsageError, match="different shapes"):
            load(tmp_path / "out", store=store)
    for budget in (1.0, 0.6):
        with pruned(whole, result.selection.choices), operating_point(whole, budget):
            wanted = logits(whole)
        for model in models:
            with operating_point(model, budget):
                assert relative(logits(model), wanted) < 1e-5


def test_frontier_points_have_the_constants_in_them(tiny_source, text_file):
    from moe_prism.jobs.frontier import subject_of
    from moe_prism.options.frontier import FrontierOptions

    opened = open_model(tiny_source)
    subject = subject_of(opened, FrontierOptions(text=str(text_file), tokens=256, length=32, calibration_tokens=256))
    names = {name: method(name).points(subject) for name in ("mone", "prune:mone-removed", "prune:easy-ep-constant-measured")}
    assert all(p.name.startswith("prune:mone-") for p in names["mone"])
    for name, points in names.items():
        changes = [change_of(p.point.weights) for p in points]
        assert all(bool(c.resident_values) == ("removed" not in name) for c in changes)
    assert len(names["mone"]) > len(names["prune:mone-removed"])  # fewer than a token uses may stay


def test_a_selection_can_be_repeated_and_a_calibration_shared(tiny_source, written, options, tmp_path):
    prune_model(tiny_source, tmp_path / "again", options, kept=written / "kept.json")
    weights = [name for name in digests(written) if name.startswith("model") or name in ("config.json", "kept.json")]
    assert all(digests(tmp_path / "again")[name] == digests(written)[name] for name in weights)
    ranked = prune_model(tiny_source, tmp_path / "ranked", PruneOptions(**{**vars(options), "allocation": "global"}))
    assert sum(len(choice.kept) for choice in ranked.selection.choices) == 4
    every = CalibrateOptions(text=options.calibration.text, tokens=512, length=32, reservoir=64)
    calibrate_model(tiny_source, tmp_path / "plain", every)
    with pytest.raises(UsageError, match="holds no 'means'"):
        select_experts(tiny_source, PruneOptions(criterion="first-half", form="constant"), calibration=tmp_path / "plain")


def test_what_cannot_be_is_refused_by_name(tiny_source, written, tmp_path, tiny_calibration):
    from moe_prism.options.refactor import RefactorOptions

    with pytest.raises(UsageError, match="constants already"):
        refactor(written, tmp_path / "out", RefactorOptions(calibration=tiny_calibration))
    with pytest.raises(UsageError, match="constants already"):
        prune_model(written, tmp_path / "out", PruneOptions(criterion="first-half"))
    with pytest.raises(UsageError, match="use --mtp keep or drop"):
        prune_model(tiny_source, tmp_path / "out", PruneOptions(criterion="mone", mtp="prune"))
    tiny.save("router-bias", tmp_path / "fused")
    with pytest.raises(UsageError, match=r"use --form removed.*every matrix of every expert"):
        prune_model(tmp_path / "fused", tmp_path / "out", PruneOptions(criterion="mone"))
    with pytest.raises(UsageError, match="leaves 0 of 4"):
        prune_model(tiny_source, tmp_path / "out", PruneOptions(criterion="mone", keep=0.1))


@pytest.mark.parametrize(
    "harm", ["no value", "a value too many", "of a layer that is not", "all of a layer", "no list", "weights too"]
)
def test_a_damaged_folder_is_refused(written, tmp_path, harm):
    folder = tmp_path / "bad"
    folder.mkdir()
    tensors = {name: t for file in written.glob("model*.safetensors") for name, t in load_file(file).items()}
    config = json.loads((written / "config.json").read_text())
    value = next(name for name in tensors if name.endswith("approx_value"))
    if harm == "no value":
        del tensors[value]
    elif harm == "a value too many":
        layer, ids = next(iter(config[CONFIG_KEY].items()))
        tensors[f"model.layers.{layer}.mlp.experts.{min(set(range(4)) - set(ids))}.approx_value"] = tensors[value].clone()
    elif harm == "weights too":
        tensors[value.replace("approx_value", "down_proj.weight")] = torch.zeros(4, 4)
    else:
        changed = {"of a layer that is not": {"7": [0]}, "all of a layer": {"0": [0, 1, 2, 3]}, "no list": {"0": "all"}}
        config[CONFIG_KEY] = changed[harm]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError):
        load_model(folder)


def test_constants_of_a_file_are_checked():
    row = {"experts": 4, "kept": [0, 1], "groups": None, "masked": False}
    good = constants(2, 8)
    assert change_of(PruneChange((KeptExperts(4, (0, 1), constants=good),)).part()).kept[0].constants == good
    for text in ("!", "AAA=", "", 5, Constants.of(torch.full((2, 8), torch.inf)).text):
        with pytest.raises(CorruptError):
            PruneChange.from_settings({"layers": [{**row, "constants": text}]})
