"""What removing neurons costs in quality, beside removing whole experts: mean KL to the full model on text that nothing was fitted on.

    python benchmarks/compress.py                                  # prism-nano and prism-nano-mix
    python benchmarks/compress.py --models nano --only points --tokens 8192
    python benchmarks/compress.py --models nano --only neurons     # single neurons: rank correlations

points: every method at every share, and experts that share weights (`m-smoe`), over calibration draws. `random-neurons` has draws of its
own; `magnitude` runs once, since it reads no text. Experts are removed by the criteria named with --criteria, with as many bytes left, and
the best of them is what neurons are held against. Points run in memory, which gives the logits of what is written
(tests/jobs/test_slice.py).

neurons: --sample-neurons of them are removed one at a time, on held-out text and on the first draw's calibration text. Spearman's rank
correlation of each score with the KL and with the rise of the loss of the next token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from printed import printed
from pruning import Bench
from scipy.stats import spearmanr
from torch import Tensor, nn

from moe_prism.calibrate.statistics import Statistics
from moe_prism.compress.changes import Change
from moe_prism.compress.codec.low_rank_sparse import LowRankSparse
from moe_prism.compress.prune import criteria
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from moe_prism.methods.find import method
from moe_prism.methods.merge.base import MergeMethod, routed_layers
from moe_prism.methods.neurons.base import LayerSeen, NeuronMethod
from moe_prism.options.prune import PruneOptions
from moe_prism.point import OperatingPoint

TEXTS = {"nano": "stdlib"}
OTHER_TEXT = "domains"
PUBLISHED = ("heapr", "camera", "slim", "wanda", "magnitude", "random-neurons")
VARIANTS = (
    "heapr:by=tokens", "heapr:total=true", "heapr:scope=layer", "heapr:scope=expert", "heapr:scope=expert:multiple=16",
    "heapr:multiple=16", "heapr:total=true:scope=expert:multiple=16", "camera:alpha=0", "camera:scope=expert:multiple=16",
    "slim:scope=model",
    "slim:signed=false:scope=model",
    "heapr:total=true:by=tokens", "slim:signed=false", "wanda:owl=false", "magnitude:scope=expert:multiple=16",
)  # fmt: skip
SINGLE = (
    "heapr",
    "heapr:by=tokens",
    "heapr:total=true",
    "camera",
    "camera:alpha=0",
    "slim",
    "slim:signed=false",
    "wanda",
    "magnitude",
)
MERGING = (
    "m-smoe", "m-smoe:align=false", "m-smoe:groups=random", "mc-smoe", "mc-smoe:sparse=0",
    "sub-moe", "sub-moe:joint=1", "sub-moe:align=false", "sub-moe:clusters=scores", "sub-moe:clusters=random",
    "sub-moe:thin=0.5", "sub-moe:thin=0.5:white=false", "svd of each expert: bits=4", "svd of each expert: bits=6",
    "stun:drop=0", "stun", "stun:drop=0.25", "stun:drop=0.25:by=scores", "stun:drop=0.25:by=random", "stun:drop=0.25:scope=model",
    "stun:drop=0.25:owl=false",
    "dern", "dern:threshold=0.2", "dern:threshold=0.25", "dern:threshold=0.3", "dern:threshold=0.35", "dern:threshold=0.4",
    "dern:threshold=0.25:seeds=own", "dern:threshold=0.25:seeds=random", "dern:threshold=0.3:seeds=own", "dern:threshold=0.3:seeds=random",
    "dern:threshold=0.3:gate=true", "dern:threshold=0.3:weighted=false",
)  # fmt: skip
PLAIN_SVD = "svd of each expert: bits="
"""Each expert's own singular vectors, as many bytes as so many bits of 16 say."""
ERROR_ROWS = 2
BLIND = ("magnitude", "random-neurons")
CRITERIA = "soft-selected-layer,easy-ep-layer,easy-ep-global,output-error-layer,output-error-global"


def needed(args: argparse.Namespace) -> set[str]:
    """Collectors that the methods and criteria of a run read."""
    found = {"counts"}
    if args.only in (None, "neurons"):
        found |= {"neurons", "gradients"}
    for name in args.methods if args.only in (None, "points") else ():
        found |= set() if name.startswith(PLAIN_SVD) else {*getattr(method(name), "collectors", ())}
    for name in args.criteria:
        found |= {*criteria.get(name.rpartition("-")[0]).needs}
    return found


class NeuronBench(Bench):
    """The model, its held-out text, and what every draw of calibration text says."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, tuple(sorted(needed(args))))
        self.passes = [self.calibrate(seed) for seed in range(args.seeds)]
        self.free = [torch.zeros(layer.num_experts, layer.width, dtype=torch.bool) for layer in self.layers]

    def judged(self, name: str, found: Statistics) -> tuple[NeuronMethod, list[tuple[Tensor, float]]]:
        """A method and what it says of every layer."""
        chosen: Any = method(name)
        return chosen, [chosen.judge(LayerSeen(layer, own.values)) for layer, own in zip(self.layers, found.layers, strict=True)]

    def changes(self, name: str, keep: float) -> list[Change]:
        """A change for every draw."""
        if name.startswith(PLAIN_SVD):
            return [QuantizeChange(LowRankSparse(sparse=0.0), float(name.removeprefix(PLAIN_SVD)), 32)]
        merging: Any = method(name)
        if isinstance(merging, MergeMethod):
            every = [routed_layers(self.model, self.layers, [own.values for own in found.layers]) for found in self.passes]
            return [merging.change(layers, keep) for layers in every]
        if name.startswith("random"):
            names, draws = [f"{name}:seed={seed}" for seed in range(self.args.seeds)], [0] * self.args.seeds
        else:
            draws = [0] if name.partition(":")[0] in BLIND else list(range(self.args.seeds))
            names = [name] * len(draws)
        found: list[Change] = []
        for each, draw in zip(names, draws, strict=True):
            chosen, judged = self.judged(each, self.passes[draw])
            found.append(chosen.change(judged, keep, self.free))
        return found

    @cached_property
    def seen(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of every layer of the full model, on held-out text: inputs, choices, weights, outputs of the experts."""
        found: list[Any] = []
        for layer in self.layers:

            def note(x: Tensor, index: Tensor, weight: Tensor, layer: Any = layer) -> Tensor:
                y = layer.stock(x, index, weight)
                found.append((layer.index, x.clone(), index.clone(), weight.clone(), y.clone()))
                return y

            layer.install(note)
        with torch.no_grad():
            self.model(input_ids=self.ids[:ERROR_ROWS], use_cache=False)
        for layer in self.elastic.layers:
            layer.parts.layer.install(layer)
        return [rest for _, *rest in sorted(found, key=lambda row: row[0])]

    @torch.no_grad()
    def error(self, change: Change) -> float | None:
        """Mean over layers of ‖y - y'‖² / ‖y‖², y' with the change and the same choices; None where experts are not there any more."""
        if getattr(change, "staying", None) is not None:
            return None
        full = self.seen
        with change.installed(self.model, self.layers):
            outputs = [layer.by_expert(x, i, w) for layer, (x, i, w, _) in zip(self.layers, full, strict=True)]
        each = [float((a - b).square().sum() / b.square().sum()) for a, (*_, b) in zip(outputs, full, strict=True)]
        return statistics.fmean(each)

    def pruned(self, name: str, keep: float) -> list[Any]:
        """The experts that stay of every draw, by CRITERION-ALLOCATION."""
        criterion, _, allocation = name.rpartition("-")
        options = PruneOptions(criterion=criterion, keep=keep, allocation=allocation)  # type: ignore[arg-type]
        return [self.plan(options, found) for found in self.passes]


def point_rows(bench: NeuronBench) -> Iterator[dict[str, Any]]:
    """KL of every draw, and the share of the experts' bytes that stays."""
    for keep in bench.args.keeps:
        for name in bench.args.methods:
            changes = bench.changes(name, keep)
            points = [OperatingPoint(weights=change.part()) for change in changes]
            found = measure(bench.model, bench.ids, points, batch=2)
            kl = [m.quality.kl for m in found]
            errors = [e for change in changes if name in MERGING and (e := bench.error(change)) is not None]
            share = statistics.fmean(c.resident_share for c in changes)
            yield {"keep": keep, "way": name, "kl": kl, "resident": share, "error": errors}
        for name in bench.args.criteria:
            try:
                plans = bench.pruned(name, keep)
            except UsageError as error:
                yield {"keep": keep, "way": f"experts, {name}", "refused": str(error)}
                continue
            share = sum(len(c.kept) for c in plans[0]) / sum(c.experts for c in plans[0])
            yield {"keep": keep, "way": f"experts, {name}", "kl": bench.kl(plans), "resident": share}


@torch.no_grad()
def losses_of_one(bench: NeuronBench, ids: Tensor, sample: Sequence[tuple[int, int, int]]) -> tuple[list[float], list[float]]:
    """(KL, rise of the mean loss) without each neuron (layer, expert, neuron) alone."""

    def logs() -> Tensor:
        return bench.model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)

    def loss(found: Tensor) -> float:
        return float(nn.functional.nll_loss(found, ids[:, 1:].flatten()))

    divergence, rise, source = [], [], logs()
    for layer, expert, neuron in sample:
        column = bench.layers[layer].down[expert, :, neuron]
        before = column.clone()
        column.zero_()
        found = logs()
        column.copy_(before)
        divergence.append(float((source.exp() * (source - found)).sum(-1).mean()))
        rise.append(loss(found) - loss(source))
    return divergence, rise


def neuron_rows(bench: NeuronBench) -> Iterator[dict[str, Any]]:
    """Rank correlations of scores with what removing one neuron does."""
    g = torch.Generator().manual_seed(0)
    sizes = [len(bench.layers), bench.layers[0].num_experts, bench.layers[0].width]
    sample = [tuple(int(torch.randint(n, (), generator=g)) for n in sizes) for _ in range(bench.args.sample_neurons)]
    texts = {"held out": bench.ids, "calibration": bench.passes[0].profile}
    rows = max(1, bench.args.neuron_tokens // bench.args.length)
    measured = {name: losses_of_one(bench, ids[:rows], sample) for name, ids in texts.items()}  # type: ignore[arg-type]
    for name in SINGLE:
        _, judged = bench.judged(name, bench.passes[0])
        scores = [float(judged[layer][0][expert, neuron]) for layer, expert, neuron in sample]
        found = {
            f"{what}, {text}": float(spearmanr(scores, values).statistic)
            for text, both in measured.items()
            for what, values in zip(("kl", "loss"), both, strict=True)
        }
        yield {"way": name, "spearman": found}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        own = argparse.Namespace(**vars(args), model=name, text=TEXTS.get(name, OTHER_TEXT))
        bench = NeuronBench(own)
        for kind, made in (("points", point_rows), ("neurons", neuron_rows)):
            if args.only in (None, kind):
                yield from ({"model": name, **row} for row in made(bench))


def bars(found: list[dict[str, Any]]) -> Iterator[str]:
    """The comparisons that issue 20 asks for, from means over draws."""
    for model in dict.fromkeys(row["model"] for row in found):
        own = [row for row in found if row["model"] == model and "kl" in row]
        for keep in dict.fromkeys(row["keep"] for row in own):
            kl = {row["way"]: statistics.fmean(row["kl"]) for row in own if row["keep"] == keep}
            order = ("heapr", "camera", "magnitude", "random-neurons")
            if not set(order) <= set(kl):
                continue
            said = " <= ".join(f"{name} {kl[name]:.4f}" for name in order)
            holds = all(kl[a] <= kl[b] for a, b in itertools.pairwise(order))
            yield f"{model} at {keep:g}: {said}: {holds}"
            experts = {way: value for way, value in kl.items() if way.startswith("experts")}
            neurons = {way: value for way, value in kl.items() if not way.startswith("experts") and way not in MERGING}
            if experts:
                best, least = min(experts, key=experts.__getitem__), min(neurons, key=neurons.__getitem__)
                against = f"the best of experts ({best.partition(', ')[2]} {experts[best]:.4f})"
                ratios = (kl[name] / experts[best] for name in ("heapr", least))
                yield f"{model} at {keep:g}: heapr {next(ratios):.2f}x, {least} {next(ratios):.2f}x {against}"
        correlations = {row["way"]: row["spearman"] for row in found if row["model"] == model and "spearman" in row}
        for what in correlations.get("heapr", {}):
            a, b = (correlations[name][what] for name in ("heapr", "magnitude"))
            yield f"{model}: Spearman with {what}: heapr {a:.3f} (bar .5: {a >= 0.5}), magnitude {b:.3f}"


def show(row: dict[str, Any]) -> str:
    where = f"{row['model']:>8} {row.get('keep', 1):.2f} {row['way']:42}"
    if "refused" in row:
        return f"{where} refused: {row['refused']}"
    if "spearman" in row:
        return f"{where} " + "  ".join(f"{name} {value:.3f}" for name, value in row["spearman"].items())
    values = row["kl"]
    spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    error = f"  layer error {statistics.fmean(row['error']):.3f}" if row.get("error") else ""
    return f"{where} resident {row['resident']:.3f}  KL {statistics.fmean(values):.4f}{spread}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: dict[str, Any] = {"type": lambda text: text.split(","), "help": "comma-separated"}
    parser.add_argument("--models", default=["nano", "nano-mix"], **names)
    parser.add_argument("--criteria", default=CRITERIA.split(","), **names)
    parser.add_argument("--only", choices=("points", "neurons"))
    parser.add_argument("--methods", default=[*PUBLISHED, *VARIANTS, *MERGING], **names)
    parser.add_argument("--keeps", default=[0.9, 0.75, 0.5], type=lambda text: [float(x) for x in text.split(",")])
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws")
    parser.add_argument("--tokens", type=int, default=4096, help="held out")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--profile-tokens", type=int, default=1024)
    parser.add_argument("--sample", type=int, default=1024, help="sampled tokens per layer, of output-error")
    parser.add_argument("--sample-neurons", type=int, default=200)
    parser.add_argument("--neuron-tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    lines = list(bars(found))
    print(json.dumps({"benchmark": "compress", "rows": found, "bars": lines}) if args.json else "\n".join(lines))


if __name__ == "__main__":
    main()
