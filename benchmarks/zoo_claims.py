"""What each architecture of the zoo claims, measured on its trained model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bootstrap import mean_interval
from torch import nn
from zoo_models import BASE, BUDGETS, LENGTH, PICTURES, SLACK, TIMES, Zoo, information, load_of

from moe_prism.architectures import architectures
from moe_prism.architectures.base import Picturing, routers
from moe_prism.architectures.dit_moe import between
from moe_prism.artefact.open import open_model
from moe_prism.compress.codec.signs import Ternary
from moe_prism.frontier.measure import measure
from moe_prism.jobs.refactor import refactor
from moe_prism.model import find_layers, load_model
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.refactor import RefactorOptions
from moe_prism.point import FULL
from moe_prism.training.loop import Recorder


def smoe_dropout(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss by k, of the drawn router and of the learned one."""
    found: dict[str, Any] = {}
    for name in ("smoe-dropout", BASE):
        model = zoo.model(name, seed)
        own, by_k = routers(model), []
        before = [router.top_k for router in own]
        for k in range(1, model.config.num_experts + 1):
            for router in own:
                router.top_k = k
            by_k.append(float(zoo.losses(model).mean()))
        for router, k in zip(own, before, strict=True):
            router.top_k = k
        found[name] = [round(loss, 4) for loss in by_k]
    losses = found["smoe-dropout"]
    best = [min(losses[: i + 1]) for i in range(len(losses))]
    spread = {name: round(max(values) - min(values), 4) for name, values in found.items()}
    rise = max(loss / lowest - 1 for loss, lowest in zip(losses, best, strict=True))
    return {
        "by_k": found,
        "largest_rise": round(rise, 5),
        "non_increasing": rise <= SLACK,
        "spread": spread,
        "holds": rise <= SLACK and spread["smoe-dropout"] < spread[BASE],
    }


def elastic(zoo: Zoo, seed: int) -> dict[str, Any]:
    """KL of the threshold rule to the own full model, for neighbouring blocks and for those of the default solver; full loss."""
    found: dict[str, Any] = zoo.against_base("elastic", seed)
    kls: dict[str, dict[str, list[float]]] = {}
    for name in ("elastic", BASE):
        for solver in ("contiguous", "alt"):
            with tempfile.TemporaryDirectory() as scratch:
                out, folder = Path(scratch) / "cut", zoo.folder(name, seed)
                calibration = CalibrateOptions(text="stdlib", tokens=zoo.args.tokens, length=LENGTH)
                assert folder is not None
                refactor(folder, out, RefactorOptions(n_sub=4, solver=solver, calibration=calibration))
                points = [FULL.with_budget(budget, "threshold") for budget in BUDGETS]
                measured = measure(open_model(out).model, zoo.ids, points, batch=1)
            kls.setdefault(name, {})[solver] = [round(each.quality.kl, 5) for each in measured]
    best = {name: [min(pair) for pair in zip(*by.values(), strict=True)] for name, by in kls.items()}
    ratios = [round(a / b, 4) for a, b in zip(best["elastic"], best[BASE], strict=True)]
    gap = found["loss"][0] / found["loss_base"][0] - 1
    return found | {"kl": kls, "ratios": ratios, "full_gap": round(gap, 5), "holds": max(ratios) <= 0.5 and gap <= 0.01}


def dynamic_moe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Experts per token, and whether tokens of a larger loss take more."""
    model = zoo.model("dynamic-moe", seed)
    counts = torch.stack([r.chosen.sum(1) for r in zoo.routings(model)]).mean(0).view(len(zoo.ids), -1)
    with torch.no_grad():
        nats = [
            nn.functional.cross_entropy(model(input_ids=row[None], use_cache=False).logits[0, :-1], row[1:], reduction="none")
            for row in zoo.ids
        ]
    pair = np.corrcoef(counts[:, :-1].flatten().numpy(), torch.cat(nats).numpy())
    found = zoo.against_base("dynamic-moe", seed)
    mean = float(counts.mean())
    active = zoo.model(BASE, seed).config.num_experts_per_tok
    return found | {
        "experts": round(mean, 3),
        "experts_base": active,
        "correlation_with_loss": round(float(pair[0, 1]), 4),
        "holds": mean < active and found["difference"][1] <= 0 and float(pair[0, 1]) > 0,
    }


def sigma_moe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Largest / mean load of layer 0, with the schedule and without."""
    with_it, without = (load_of(zoo.routings(zoo.model(name, seed))[0]) for name in ("sigma-moe", "sigma-moe-no-schedule"))
    found = zoo.against_base("sigma-moe", seed, "sigma-moe-no-schedule")
    return found | {"load": with_it, "load_base": without, "holds": with_it < without}


def deepseek_moe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss at as many expert weights, in all and per token."""
    found = zoo.against_base("deepseek-moe", seed)
    return found | {"holds": found["difference"][2] < 0}


def sinkhorn(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Largest / mean load, mean over layers, against softmax without a balance loss."""
    loads = {}
    for name in ("sinkhorn", "top-k-no-balance"):
        loads[name] = round(float(np.mean([load_of(r) for r in zoo.routings(zoo.model(name, seed))])), 3)
    found = zoo.against_base("sinkhorn", seed, "top-k-no-balance")
    return found | {
        "load": loads["sinkhorn"],
        "load_base": loads["top-k-no-balance"],
        "holds": loads["sinkhorn"] < loads["top-k-no-balance"],
    }


def adamoe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """True experts per token against k E / (E + m), their spread over tokens, and the loss at a matched mean."""
    model = zoo.model("adamoe", seed)
    config = model.config
    true = torch.stack([r.chosen[:, : config.num_experts].sum(1) for r in zoo.routings(model)])
    wanted = config.num_experts_per_tok * config.num_experts / (config.num_experts + config.null_experts)
    found, mean = zoo.against_base("adamoe", seed), float(true.mean())
    return found | {
        "experts": round(mean, 3),
        "wanted": wanted,
        "spread_over_tokens": round(float(true.std(1).mean()), 3),
        "holds": abs(mean / wanted - 1) <= 0.05 and float(true.std(1).mean()) > 0 and found["difference"][1] <= 0,
    }


def moe_plus_plus(zoo: Zoo, seed: int, name: str = "moe-plus-plus") -> dict[str, Any]:
    """Share of choices that are usual experts, against tau F / (tau F + Z)."""
    model = zoo.model(name, seed)
    config = model.config
    folder = zoo.folder(name, seed)
    assert folder is not None
    tau = json.loads((folder / "prism.json").read_text())["inputs"]["settings"]["tau"]
    chosen = torch.stack([r.chosen for r in zoo.routings(model)])
    usual, others = config.num_experts, config.zero_experts + config.copy_experts + config.constant_experts
    share, wanted = float(chosen[..., :usual].sum() / chosen.sum()), tau * usual / (tau * usual + others)
    found = zoo.against_base(name, seed)
    return found | {
        "share": round(share, 4),
        "wanted": round(wanted, 4),
        "holds": abs(share / wanted - 1) <= 0.05 and found["difference"][1] <= 0,
    }


def adamoe_nano(zoo: Zoo, seed: int) -> dict[str, Any]:
    """True experts per token of nano made an AdaMoE, against k E / (E + m), and its loss against nano with as many for every token.

    nano's loss at a mean between two counts lies on the line between theirs, window by window.
    """
    model, nano = zoo.model("adamoe-nano", seed), load_model("nano", torch.float32)
    config = model.config
    true = torch.stack([r.chosen[:, : config.num_experts].sum(1) for r in zoo.routings(model)])
    wanted = config.num_experts_per_tok * config.num_experts / (config.num_experts + config.null_experts)
    mean, own, by_k = float(true.mean()), routers(nano), {}
    for k in {int(mean), int(mean) + 1, nano.config.num_experts_per_tok}:
        for router in own:
            router.top_k = max(1, k)
        by_k[k] = zoo.losses(nano)
    low = int(mean)
    matched = by_k[low] + (mean - low) * (by_k[low + 1] - by_k[low])
    losses = zoo.losses(model)
    difference = mean_interval(losses - matched)
    return {
        "experts": round(mean, 3),
        "wanted": round(wanted, 3),
        "spread_over_tokens": round(float(true.std(1).mean()), 3),
        "loss": mean_interval(losses),
        "difference_at_this_load": difference,
        "difference_to_nano": mean_interval(losses - by_k[nano.config.num_experts_per_tok]),
        "holds": abs(mean / wanted - 1) <= 0.05 and float(true.std(1).mean()) > 0 and difference[2] < 0,
    }


def rmoe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Mutual information of the first choices of neighbouring layers."""
    means = {}
    for name in ("rmoe", BASE):
        tops = [r.logits.argmax(-1) for r in zoo.routings(zoo.model(name, seed))]
        means[name] = round(float(np.mean([information(a, b) for a, b in pairwise(tops)])), 4)
    found = zoo.against_base("rmoe", seed)
    return found | {"information": means["rmoe"], "information_base": means[BASE], "holds": means["rmoe"] > means[BASE]}


def read_me(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss, and how many tokens have the same first choice as the one before them, mean over layers."""
    found, same = zoo.against_base("read-me", seed), {}
    for name in ("read-me", BASE):
        tops = [r.logits.argmax(-1).view(len(zoo.ids), -1) for r in zoo.routings(zoo.model(name, seed))]
        same[name] = round(float(torch.stack([(top[:, 1:] == top[:, :-1]).float().mean() for top in tops]).mean()), 4)
    return found | {"repeats": same["read-me"], "repeats_base": same[BASE], "holds": found["difference"][1] <= 0}


def rexmoe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss at as many expert weights, and how many choices are a neighbour's experts."""
    model = zoo.model("rexmoe", seed)
    experts, group = model.config.num_experts, model.config.group_layers
    far = [(r.ids // experts != i % group).float().mean() for i, r in enumerate(zoo.routings(model))]
    found = zoo.against_base("rexmoe", seed)
    return found | {"share_of_neighbours": round(float(torch.stack(far).mean()), 4), "holds": found["difference"][2] < 0}


def chain_of_experts(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss at as many expert calls, and how many tokens choose another set in the second pass."""
    found = zoo.against_base("chain-of-experts", seed)
    passes = zoo.routings(zoo.model("chain-of-experts", seed))
    other = [
        (a.ids.sort(1).values != b.ids.sort(1).values).any(1).float().mean()
        for a, b in zip(passes[::2], passes[1::2], strict=True)
    ]
    share = float(torch.stack(other).mean())
    return found | {"other_set": round(share, 4), "holds": found["difference"][2] < 0 and share > 0.5}


def mote(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss between that of the dense model and that of experts in full precision, and what the codec of three values changes."""
    losses = {name: zoo.losses(zoo.model(name, seed)) for name in ("mote", "mote-dense", "mote-full")}
    to_dense, to_full = (mean_interval(losses["mote"] - losses[name]) for name in ("mote-dense", "mote-full"))
    model = zoo.model("mote", seed)
    weights = sum(layer.num_experts * layer.parameters_per_expert() for layer in find_layers(model))
    matrices = [p for layer in find_layers(model) for p in layer.module.parameters()]
    codec = Ternary()
    stored = sum(codec.bytes(tuple(p.shape), codec.widths[0], p.shape[-1]) for p in matrices)
    return {
        "loss": mean_interval(losses["mote"]),
        "to_dense": to_dense,
        "to_full": to_full,
        "bytes_of_bfloat16": round(stored / (2 * weights), 4),
        "holds": to_dense[2] < 0 and to_full[2] >= 0,
    }


def union_of_experts(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Loss at as many neurons in all and per token as the mixture, for both selections, and against all slices."""
    found = zoo.against_base("union-of-experts", seed)
    own = zoo.losses(zoo.model("union-of-experts", seed))
    data, dense = (zoo.losses(zoo.model(f"union-of-experts-{name}", seed)) for name in ("data", "dense"))
    plain = zoo.losses(zoo.model(BASE, seed))
    by_data, to_dense = mean_interval(data - plain), mean_interval(own - dense)
    best = min(found["difference"][2], by_data[2])
    return found | {"difference_by_data": by_data, "to_dense": to_dense, "holds": best < 0}


def changes_late(zoo: Zoo, name: str, seed: int) -> float:
    """Share of tokens and layers whose set of experts is another at the end than after LATE of the steps."""
    late, end = (zoo.routings(zoo.model(each, seed)) for each in (f"{name}-late", name))
    other = [(a.ids.sort(1).values != b.ids.sort(1).values).any(1).float().mean() for a, b in zip(late, end, strict=True)]
    return round(float(torch.stack(other).mean()), 4)


def graph_of_tokens(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Late changes of assignment, entropy of the scores, and loss, for both kinds of neighbours."""
    found: dict[str, Any] = {}
    for name in (BASE, "graph-of-tokens", "graph-of-tokens-attention"):
        logs = [r.logits.float().log_softmax(-1) for r in zoo.routings(zoo.model(name, seed))]
        entropy = float(torch.stack([-(log.exp() * log).sum(-1).mean() for log in logs]).mean())
        found[name] = {"changes": changes_late(zoo, name, seed), "entropy": round(entropy, 4)}
        if name != BASE:
            found[name] |= zoo.against_base(name, seed)
    own = [found[name]["changes"] for name in found if name != BASE]
    return found | {"holds": max(own) < found[BASE]["changes"]}


@torch.no_grad()
def dit_moe(zoo: Zoo, seed: int) -> dict[str, Any]:
    """Mutual information of a patch's first expert with the time, the place and the class; how concentrated loads are by time."""
    model = zoo.model(PICTURES, seed)
    kind = architectures.get(PICTURES)
    task = kind(*kind.example()).task()
    assert isinstance(task, Picturing)
    held = task.examples().held
    recorder, tops = Recorder(model), []
    times, classes = [], []
    for bin_ in range(TIMES):  # every picture at every tenth of the time, so that time tells nothing of the class
        noise = torch.randn(held[:, :-1].shape, generator=torch.Generator().manual_seed(bin_))
        time = torch.full((len(held),), (bin_ + 0.5) / TIMES)
        with recorder.recording() as routings:
            model(pixels=between(noise, held[:, :-1], time), time=time, classes=held[:, -1].long())
        tops.append(torch.stack([r.ids[:, 0] for r in routings]))
        patches = tops[-1].shape[1] // len(held)
        times.append(torch.full((tops[-1].shape[1],), bin_))
        classes.append(held[:, -1].long().repeat_interleave(patches))
    recorder.close()
    chosen, when, what = torch.cat(tops, 1), torch.cat(times), torch.cat(classes)
    where = torch.arange(len(when)) % patches
    about = {
        name: round(float(np.mean([information(row, other) for row in chosen])), 4)
        for name, other in (("time", when), ("place", where), ("class", what))
    }
    loads = [torch.stack([torch.bincount(row, minlength=model.config.num_experts).double() for row in top]) for top in tops]
    entropy = [round(float(torch.special.entr(load / load.sum(1, keepdim=True)).sum(1).mean()), 4) for load in loads]
    early, late = float(np.mean(entropy[: TIMES // 2])), float(np.mean(entropy[TIMES // 2 :]))
    return {
        "information": about,
        "entropy_of_loads_by_time": entropy,
        "loss": round(task.judge(model, held), 4),
        "concentrated_early": early < late,
        "holds": about["time"] > about["class"] and early < late,
    }


CLAIMS: Mapping[str, tuple[Callable[[Zoo, int], dict[str, Any]], Sequence[str]]] = {
    "smoe-dropout": (smoe_dropout, (BASE,)),
    "elastic": (elastic, (BASE,)),
    "dynamic-moe": (dynamic_moe, (BASE,)),
    "sigma-moe": (sigma_moe, ("sigma-moe-no-schedule",)),
    "deepseek-moe": (deepseek_moe, (BASE,)),
    "adamoe": (adamoe, (BASE,)),
    "moe-plus-plus": (moe_plus_plus, (BASE,)),
    "rmoe": (rmoe, (BASE,)),
    "rexmoe": (rexmoe, (BASE,)),
    "read-me": (read_me, (BASE,)),
    "chain-of-experts": (chain_of_experts, (BASE,)),
    "sinkhorn": (sinkhorn, ("top-k-no-balance",)),
    "adamoe-nano": (adamoe_nano, ()),
    "moe-plus-plus-capacity": (partial(moe_plus_plus, name="moe-plus-plus-capacity"), (BASE,)),
    "mote": (mote, ("mote-dense", "mote-full")),
    "union-of-experts": (union_of_experts, (BASE, "union-of-experts-data", "union-of-experts-dense")),
    "graph-of-tokens": (
        graph_of_tokens,
        (BASE, "top-k-late", "graph-of-tokens-late", "graph-of-tokens-attention", "graph-of-tokens-attention-late"),
    ),
    "dit-moe": (dit_moe, ()),
}
"""Architecture -> its claim, and the other runs that it needs."""
