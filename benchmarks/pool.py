"""Whole models as experts, against the "works when" lines of MoE², Symbolic-MoE and Rocket.

    python benchmarks/pool.py [--chunks 24] [--characters 400] [--steps 60] [--limits 1,1.5,2.25,3.25] [--only rocket] [--seed 0] [--json]

The pool: `nano` and `nano-mix` with 4, 2 and 1 experts per token, and three fine-tunes of nano's experts, one for each domain that it
was not trained on (`benchmarks/adapters.py` trains them). The questions are pieces of text of four domains. Quality of a piece: exp(-nats
per character), so that models of different tokenizers compare. Everything is fitted on the calibration side, every figure is of the
evaluation side, with 95 % intervals (bootstrap over pieces). Cost: multiplications of a token's experts, in those of nano's four.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from adapters import chosen, train
from bootstrap import mean_interval
from numpy.typing import NDArray
from printed import printed

from moe_prism.data import token_windows
from moe_prism.data.buckets import CALIBRATION, HELD_OUT, bucket_of
from moe_prism.data.bundled import DOMAINS, domain
from moe_prism.model import load_model, load_tokenizer
from moe_prism.model.named import NANO, SHIPPED
from moe_prism.pool import ModelOption, Record, SubsetLimits, choosers
from moe_prism.pool.gate import Gate, mixture
from moe_prism.pool.moe2 import best_ridge, fit_gate
from moe_prism.pool.rocket import brute_force, greedy, merit, objective
from moe_prism.pool.subset import Needs, branch_and_bound, exhaustive, subset_quality
from moe_prism.pool.symbolic import answer_grouped, by_model
from moe_prism.pool.text import embed_all

Floats = NDArray[np.float64]
COUNTS = (4, 2, 1)
TUNED = ("prose", "headers", "web")
TRAIN_LENGTH, TRAIN_TOKENS = 128, 32768


def pieces(side: int, characters: int, most: int) -> tuple[list[str], list[str]]:
    """(texts, their domains): so many of each domain, spread over its files of one side."""
    texts, kinds = [], []
    for name in DOMAINS:
        found = [
            d.text[at : at + characters]
            for d in domain(name)
            if bucket_of(d.name) == side
            for at in range(0, len(d.text) - characters + 1, characters)
        ]
        step = max(1, len(found) // most)
        texts += found[::step][:most]
        kinds += [name] * len(found[::step][:most])
    return texts, kinds


def cost(config: Any, count: int) -> float:
    """Weights that a token's experts multiply by."""
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    return 3.0 * config.hidden_size * (count * width + shared) * config.num_hidden_layers


def with_count(model: Any, count: int) -> Any:
    """The model with so many experts per token, as transformers would compute it."""
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = count
    return model


@torch.no_grad()
def halfway(base: Any, tuned: Any) -> Any:
    """A weaker twin of a fine-tune: half of what it changed."""
    made = load_model(NANO).float().eval()
    for own, before, after in zip(made.parameters(), base.parameters(), tuned.parameters(), strict=True):
        own.copy_((before + after) / 2)
    return made


@torch.no_grad()
def said(model: Any, tokenizer: Any, text: str, *, states: bool = False) -> tuple[Floats, float, Floats]:
    """(log-probability of each token after the first, share of them that were the likeliest, hidden states [T, d] or nothing)."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = model(input_ids=ids, output_hidden_states=states)
    logits = out.logits[0, :-1].float()
    wanted = ids[0, 1:, None]
    likely = torch.log_softmax(logits, -1).gather(1, wanted)[:, 0]
    hidden = out.hidden_states[-1][0, :-1].numpy().astype(np.float64) if states else np.zeros((0, 0))
    return likely.numpy().astype(np.float64), float((logits.argmax(-1) == wanted[:, 0]).double().mean()), hidden


def asked(models: Sequence[tuple[Any, Any]], texts: Sequence[str]) -> tuple[Floats, Floats, Floats]:
    """[Q, O] each: quality per character, share of right tokens, mean probability of a token (geometric)."""
    shape = (len(texts), len(models))
    quality, right, support = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for o, (make, tokenizer) in enumerate(models):
        model = make()
        for q, text in enumerate(texts):
            likely, right[q, o], _ = said(model, tokenizer, text)
            quality[q, o], support[q, o] = math.exp(likely.sum() / len(text)), math.exp(likely.mean())
    return quality, right, support


def over(values: Floats, base: Floats) -> dict[str, Any]:
    return {"quality": round(float(values.mean()), 4), "over best single": mean_interval(values - base)}


def picked(chooser: Any, quality: Floats, texts: Sequence[str]) -> Floats:
    """Quality of the option that a chooser takes for each text."""
    every = range(quality.shape[1])
    return np.array([quality[q, chooser.order(text, every)[0]] for q, text in enumerate(texts)])


def searches(instances: int, seed: int) -> dict[str, Any]:
    """Random instances of MoE²'s search and of Rocket's choice, against all subsets."""
    drawn, same, broken, looked, worst = np.random.default_rng(seed), 0, 0, [0, 0], 1.0
    for _ in range(instances):
        options = int(drawn.integers(4, 11))
        quality, seconds, energy = drawn.random((8, options)), drawn.random(options), drawn.random(options)
        limits = SubsetLimits(0.3 + 0.7 * float(drawn.random()), float(drawn.random()) * options / 2)
        needs = Needs.of(seconds, energy, None)
        every, found = (search(quality, needs, limits) for search in (exhaustive, branch_and_bound))
        same += every.chosen == found.chosen
        broken += not needs.fit(limits, found.chosen)
        looked = [looked[0] + every.looked, looked[1] + found.looked]
        size = int(drawn.integers(1, 5))
        worth = quality**3
        worst = min(worst, objective(worth, greedy(worth, size)) / objective(worth, brute_force(worth, size)))
    found = {"instances": instances, "same subset": same, "limits broken": broken, "looked at": looked}
    return {"way": "searches", **found, "worst share of greedy": round(worst, 4)}


def moe2(
    options: list[ModelOption], record: Record, held: Floats, texts: list[str], limits: Sequence[float]
) -> Iterator[dict[str, Any]]:
    made = choosers.get("moe2")
    for most in limits:
        within = SubsetLimits(energy=most)
        chooser = made.fit(options, record, within, made.Parameters())
        used = chooser.chosen()
        fits = [o for o in range(len(options)) if record.energy[o] <= most]
        best = max(fits, key=lambda o: float(record.quality[:, o].mean()))
        ridge = best_ridge(embed_all(record.texts) @ embed_all(record.texts).T, record.quality)
        alone, _ = fit_gate(replace(record, quality=record.quality[:, used]), ridge)
        row = {"way": "moe2", "limit": most, "single": options[best].name, "chosen": [options[o].name for o in used]}
        row |= {"ridge": ridge, "again": float(np.abs(alone - chooser.weights[:, used]).max())}
        row |= {"bound": round(subset_quality(held, tuple(used)), 4), "single quality": round(float(held[:, best].mean()), 4)}
        yield {**row, **over(picked(chooser, held, texts), held[:, best])}


def symbolic(options: list[ModelOption], record: Record, held: Floats, texts: list[str]) -> dict[str, Any]:
    made = choosers.get("symbolic")
    chooser = made.fit(options, record, SubsetLimits(), made.Parameters())
    recruits = [chooser.recruit(text) for text in texts]
    loads: list[int] = []

    def load(o: int) -> Any:
        loads.append(o)
        return lambda q: float(held[q, o])

    grouped = answer_grouped(recruits, load)
    alone = [{o: float(held[q, o]) for o in dict.fromkeys(own)} for q, own in enumerate(recruits)]
    one_by_one = sum(1 for before, own in zip([[], *recruits[:-1]], recruits, strict=True) for o in {*own} - {*before[-1:]})
    best = int(record.quality.mean(0).argmax())
    row = {"way": "symbolic", "models": len(by_model(recruits)), "loads": len(loads), "loads one by one": one_by_one}
    row |= {"same answers": grouped == alone, "chosen": [options[o].name for o in chooser.chosen()], "single": options[best].name}
    mean = np.array([np.mean([own[o] for o in drawn]) for own, drawn in zip(grouped, recruits, strict=True)])
    return {**row, "drawn": over(mean, held[:, best]), **over(picked(chooser, held, texts), held[:, best])}


def rocket(models: Sequence[tuple[Any, Any]], names: list[str], texts: list[str], held: list[str]) -> Iterator[dict[str, Any]]:
    """models: of one tokenizer, the base first."""
    _, right, support = asked(models, texts)
    options = [ModelOption(name, "full", 0.5, 1.0) for name in names]
    record = Record(texts, right, np.ones_like(right), np.ones(len(names)), support)
    _, held_right, held_support = asked(models, held)
    made = choosers.get("rocket")
    for label, settings in (
        ("score", made.Parameters(size=2, consistency=0.0)),
        ("score and consistency", made.Parameters(size=2)),
    ):
        chooser = made.fit(options, record, SubsetLimits(), settings)
        worth = merit(record, settings.consistency)
        top = [int(o) for o in np.argsort(-worth.mean(0), kind="stable")[:2]]
        truth = merit(Record(held, held_right, np.ones_like(held_right), record.energy, held_support), 0.5)
        row = {"way": "rocket", "by": label, "chosen": [names[o] for o in chooser.chosen()], "two best": [names[o] for o in top]}
        row |= {"diverse": round(objective(truth, chooser.chosen()), 4), "two best quality": round(objective(truth, top), 4)}
        best = int(worth.mean(0).argmax())
        row["diverse over two best"] = mean_interval(truth[:, chooser.chosen()].max(1) - truth[:, top].max(1))
        yield {**row, **over(picked(chooser, held_right, held), held_right[:, best])}


def tokens(models: Sequence[tuple[Any, Any]], names: list[str], texts: list[str], held: list[str]) -> dict[str, Any]:
    """A gate per token over the base's hidden states, and the mixture of all."""
    base = models[0][0]()
    tables = []
    for each in (texts, held):
        states = [said(base, models[0][1], text, states=True)[2] for text in each]
        likely = [[said(model, tokenizer, text)[0] for text in each] for model, tokenizer in ((m(), t) for m, t in models)]
        lengths = [len(own) for own in states]
        tables.append((np.concatenate(states), np.stack([np.concatenate(own) for own in likely], 1), lengths))
    (fit_states, fit_likely, _), (states, likely, lengths) = tables
    scale = fit_states.std(0) + 1e-6
    gate = Gate.fit(fit_states / scale, fit_likely, 1e-3)
    best = int(fit_likely.mean(0).argmax())
    found = {"gate": mixture(gate.weights(states / scale), likely), "even": mixture(np.full_like(likely, 1 / len(names)), likely)}
    ends = np.cumsum(lengths)[:-1]
    less = {n: np.array([part.mean() for part in np.split(v - likely[:, best], ends)]) for n, v in found.items()}
    row = {"way": "mixture", "single": names[best], "single nll": round(float(-likely[:, best].mean()), 4), "tokens": len(likely)}
    return {
        **row,
        **{f"{n} nll": round(float(-v.mean()), 4) for n, v in found.items()},
        **{f"{n} gain": mean_interval(v) for n, v in less.items()},
    }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    yield searches(args.instances, args.seed)
    texts, _ = pieces(CALIBRATION, args.characters, args.chunks)
    held, kinds = pieces(HELD_OUT, args.characters, args.chunks)
    nano = load_tokenizer(NANO)
    tuned = {}
    for name in TUNED if args.steps else ():
        ids = token_windows(nano, f"domains/{name}", "calibration", length=TRAIN_LENGTH, tokens=TRAIN_TOKENS).ids
        tuned[name] = train(ids, chosen(ids, 0.5), args.steps, args.seed)
    shipped = {name: load_model(folder).float().eval() for name, folder in SHIPPED.items()}
    unit = cost(shipped["nano"].config, COUNTS[0])
    options, models = [], []
    for name, model in shipped.items():
        tokenizer = load_tokenizer(SHIPPED[name])
        for count in COUNTS:
            options.append(ModelOption(name, f"top-{count}", 0.5, cost(model.config, count) / unit))
            models.append((lambda model=model, count=count: with_count(model, count), tokenizer))
    for name, model in tuned.items():
        options.append(ModelOption(f"nano:{name}", "top-4", 0.5, 1.0))
        models.append((lambda model=model: model, nano))
    if args.only != "rocket":
        yield from whole_models(args, options, models, (texts, held, kinds))
    if tuned:
        base = with_count(shipped["nano"], COUNTS[0])
        every = {"nano": base, **tuned, **{f"half of {name}": halfway(base, model) for name, model in tuned.items()}}
        yield from rocket([(lambda model=model: model, nano) for model in every.values()], [*every], texts, held)
        few = {"nano": base, **tuned}
        yield tokens([(lambda model=model: model, nano) for model in few.values()], [*few], texts, held)


def whole_models(
    args: argparse.Namespace, options: Any, models: Any, read: tuple[list[str], list[str], list[str]]
) -> Iterator[dict[str, Any]]:
    """MoE² and Symbolic-MoE."""
    texts, held, kinds = read
    own, _, _ = asked(models, texts)
    quality, _, _ = asked(models, held)
    energy = np.array([o.cost for o in options])
    for o, option in enumerate(options):
        of = {name: round(float(quality[[k == name for k in kinds], o].mean()), 4) for name in DOMAINS}
        row = {"way": "option", "name": option.name, "cost": round(option.cost, 3), "quality": mean_interval(quality[:, o])}
        yield {**row, **of}
    record = Record(texts, own, np.tile(energy, (len(texts), 1)), energy)
    yield from moe2(options, record, quality, held, args.limits)
    yield symbolic(options, record, quality, held)
    special = [o for o, option in enumerate(options) if option.model != "nano-mix" and option.level == "top-4"]
    if len(special) > 1:  # models of one size of which each knows another domain
        few, kept = [options[o] for o in special], quality[:, special]
        record = Record(texts, own[:, special], np.ones((len(texts), len(few))), np.ones(len(few)))
        for row in (*moe2(few, record, kept, held, [2.0, 4.0]), symbolic(few, record, kept, held)):
            yield {**row, "pool": "specialists"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=24, help="of each domain and side")
    parser.add_argument("--characters", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60, help="of each fine-tune; 0: none")
    parser.add_argument("--limits", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 1.5, 2.25, 3.25])
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--only", choices=("all", "rocket"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = printed(rows(args), json.dumps, args.json)
    if args.json:
        print(json.dumps({"benchmark": "pool", "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()
