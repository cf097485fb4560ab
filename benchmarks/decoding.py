"""Methods of decoding that claim accuracy, on a task with an exact checker; and what a bounded cache and less budget lose of a text.

    python benchmarks/decoding.py STEPS [--data build/nano-steps] [--only scmoe,des,concise,rewiring] [--problems 100]
                                  [--longer] [--temperature T]
    python benchmarks/decoding.py NANO --only ranks,ems,information

STEPS is a checkpoint of recipes/nano-steps, NANO a folder that `moe-prism refactor nano` wrote. Problems are held out, and every row has
its 95 % interval over problems, contexts or windows. Nothing is chosen on what is reported: every setting that was tried has a row.
--longer takes problems of more operations than any in training, which are hard; answers are greedy there, but where a method draws.
`more` is the share of right answers less that of plain decoding on the same problems, with its interval (bootstrap).

- scmoe: answers, plain, without unlikely tokens, and contrasted.
- rewiring: the router fitted to the question.
- des: problems solved by N drawn answers (pass@N), by beams of one number of experts and by beams of several, with the exact verifier of
  steps; and how much the problems solved at two numbers of experts overlap, beside those of two seeds. `cost` is experts x tokens as a
  share of one plain answer.
- concise: length and accuracy by threshold.
- ranks: KL of weak routing to the model by rank. ems: KL of a bounded cache, merging and evicting alone. information: mutual information
  of prompts and answers by budget.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RECIPE = Path(__file__).parents[1] / "recipes" / "nano-steps"
BEAMS, KEEP = 4, 1


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % of a share (Wilson)."""
    z, p = 1.96, right / of
    middle, half = (p + z * z / (2 * of)), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return max(0.0, middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


def difference(found: list[bool], plain: list[bool]) -> list[float]:
    """95 % of the difference of two shares over the same problems."""
    each = torch.tensor(found).double() - torch.tensor(plain).double()
    picks = torch.randint(0, len(each), (2000, len(each)), generator=torch.Generator().manual_seed(0))
    low, high = each[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [low, high]


class Task:
    """Held-out problems, and answers to them."""

    def __init__(self, folder: Path, data: Path, count: int, *, longer: bool = False, temperature: float = 1.75) -> None:
        """temperature: of answers that are drawn."""
        sys.path.insert(0, str(RECIPE))
        import steps

        from moe_prism.artefact.open import open_to_write

        self.steps, (self.model, self.tokenizer) = steps, open_to_write(folder)
        self.drawn, self.usual = temperature, 0.0 if longer else temperature
        self.most = 260 if longer else 150  # tokens of an answer
        lines = (data / ("longer.txt" if longer else "problems.txt")).read_text().splitlines(keepends=True)[:count]
        self.problems = [steps.read(line) for line in lines]

    def answers(
        self, decoding: Any = None, *, temperature: float | None = None, seed: int = 0, point: Any = None, rewire: int = 0
    ) -> list[Any]:
        """Of all problems, as `generate` returns them. temperature: the usual one by default."""
        from dataclasses import replace

        from moe_prism.jobs.generate import generate
        from moe_prism.options.generate import GenerateOptions, TunedOptions
        from moe_prism.point import FULL

        warm = self.usual if temperature is None else temperature
        where = replace(point or FULL, decoding=decoding)
        return [
            generate(
                self.model, self.tokenizer, p.prompt, point=where, verifier=self.steps.verifier,
                sampling=GenerateOptions(max_tokens=self.most, temperature=warm, seed=seed * 10_007 + i),
                tuned=TunedOptions(rewire=rewire),
            )
            for i, p in enumerate(self.problems)
        ]  # fmt: skip

    def right(self, made: list[Any]) -> list[bool]:
        return [self.steps.is_right(p, one.text) for p, one in zip(self.problems, made, strict=True)]

    def row(self, name: str, right: list[bool], plain: list[bool] | None = None, **more: Any) -> None:
        if plain is not None:
            more["more"] = [sum(right) / len(right) - sum(plain) / len(plain), *difference(right, plain)]
        say(name, right=sum(right) / len(right), interval=wilson(sum(right), len(right)), problems=len(right), **more)


def say(name: str, **row: Any) -> None:
    print(json.dumps({"name": name, **row}), flush=True)


def part(method: str, **settings: Any) -> Any:
    from moe_prism.point import Decoding

    return Decoding(method=method, settings=settings)


def scmoe(task: Task) -> None:
    """Drawn where greedy answers are right; beta 0 cuts unlikely tokens off and contrasts nothing."""
    plain = task.right(task.answers())
    task.row("plain", plain)
    for beta in (0.1, 0.3, 0.5, 0.9) if task.usual == 0 else (0.0, 0.5):
        task.row(f"scmoe {beta:g}", task.right(task.answers(part("scmoe", beta=beta))), plain)


def rewiring(task: Task) -> None:
    plain = task.right(task.answers())
    task.row("plain", plain)
    for steps in (5, 20):
        made = task.answers(rewire=steps)
        changed = sum(bool(one.rewired["steps"]) for one in made)
        task.row(f"rewired, {steps} steps", task.right(made), plain, changed=changed)


def des(task: Task) -> None:
    from moe_prism.methods.decode.des import with_experts
    from moe_prism.point import FULL

    elastic = task.model._moe_prism
    k = elastic.k
    if task.usual == 0:
        greedy = task.answers()
        task.row("greedy", task.right(greedy), tokens=sum(made.tokens for made in greedy))
    runs = [task.answers(temperature=task.drawn, seed=seed) for seed in range(BEAMS)]
    one = sum(made.tokens for made in runs[0]) * k
    solved = [task.right(run) for run in runs]
    task.row("one drawn answer", solved[0], cost=1.0)
    best = [any(column) for column in zip(*solved, strict=True)]
    task.row(f"best of {BEAMS}", best, solved[0], cost=sum(made.tokens for run in runs for made in run) * k / one)
    for name, spread in (("beams of one k", 0.0), ("des", 0.5)):
        made = task.answers(part("des", beams=BEAMS, keep=KEEP, spread=spread), temperature=task.drawn)
        task.row(name, task.right(made), best, cost=sum(m.decoding["expert_tokens"] for m in made) / one)
    low, high = (
        task.right(task.answers(temperature=task.drawn, point=with_experts(elastic, FULL, n))) for n in (k // 2, k + k // 2)
    )
    task.row(f"one drawn answer, k {k // 2}", low)
    task.row(f"one drawn answer, k {k + k // 2}", high)
    pairs = {
        "two seeds": (solved[0], solved[1]),
        f"k {k // 2} and {k + k // 2}": (low, high),
        f"k {k // 2} and {k}": (low, solved[0]),
    }
    for name, (a, b) in pairs.items():
        both, either = sum(x and y for x, y in zip(a, b, strict=True)), sum(x or y for x, y in zip(a, b, strict=True))
        say(f"overlap, {name}", jaccard=both / max(1, either), interval=wilson(both, max(1, either)))


def concise(task: Task) -> None:
    doubt = ",".join(["?", *task.steps.LABELS])
    plain: list[bool] | None = None
    for threshold in (2.0, 0.6, 0.3, 0.1, 0.03, 0.0):
        made = task.answers(part("concise", threshold=threshold, sure="A", unsure=doubt, close="A"), temperature=0.0)
        plain = task.right(made) if plain is None else plain
        lengths = torch.tensor([float(m.tokens) for m in made])
        half = 1.96 * float(lengths.std()) / math.sqrt(len(lengths))
        task.row(f"concise {threshold:g}", task.right(made), plain, tokens=float(lengths.mean()), half=half)


def windows(folder: Path, length: int, count: int) -> tuple[Any, Any]:
    from moe_prism import load
    from moe_prism.data import token_windows

    model, tokenizer = load(folder)
    return model, token_windows(tokenizer, "stdlib", "evaluation", length=length, tokens=length * count).ids


def ranks(folder: Path) -> None:
    from moe_prism.frontier.measure import measure
    from moe_prism.methods.decode.scmoe import rank_alone
    from moe_prism.point import OperatingPoint

    model, ids = windows(folder, 256, 16)
    points = [OperatingPoint(routing=(rank_alone(model._moe_prism, r),)) for r in range(1, model._moe_prism.k + 1)]
    rows = [[m.quality.kl for m in measure(model, ids[i : i + 1], points)] for i in range(len(ids))]
    for rank, column in enumerate(zip(*rows, strict=True), 1):
        say(f"rank {rank}", kl=mean(column)[0], half=mean(column)[1], windows=len(ids))


def mean(values: Any) -> tuple[float, float]:
    """(mean, half of its 95 % interval)."""
    rows = torch.tensor([float(v) for v in values], dtype=torch.float64)
    return float(rows.mean()), 1.96 * float(rows.std()) / math.sqrt(len(rows))


@torch.no_grad()
def ems(folder: Path) -> None:
    from moe_prism.attention.ems import EmsCache, EmsSettings, attending

    model, ids = windows(folder, 512, 6)
    for entries in (32, 64, 128, 256):
        found: dict[str, list[float]] = {"merged": [], "evicted": []}
        for row in ids:
            full = model(input_ids=row[None]).logits[0, 256:].log_softmax(-1)
            for name, alike in (("merged", 0.6), ("evicted", 2.0)):
                cache, parts = EmsCache(model.config.num_hidden_layers, EmsSettings(entries=entries, alike=alike)), []
                with attending(model, cache):
                    for start in range(0, 512, 32):
                        out = model(input_ids=row[None, start : start + 32], past_key_values=cache, use_cache=True)
                        parts.append(out.logits[0])
                log_p = torch.cat(parts)[256:].log_softmax(-1)
                found[name].append(float((full.exp() * (full - log_p)).sum(-1).mean()))
        gain = mean(a - b for a, b in zip(found["merged"], found["evicted"], strict=True))
        say(f"ems {entries}", **{name: mean(v) for name, v in found.items()}, difference=gain, bytes=cache.bytes)


def information(folder: Path) -> None:
    from moe_prism.frontier.information import answer_information
    from moe_prism.point import FULL, OperatingPoint, RoutingStage

    model, ids = windows(folder, 12, 64)
    layers = len(model._moe_prism.layers)
    points = {"full": FULL, **{f"budget {b:g}": FULL.with_budget(b, "threshold", "none") for b in (0.75, 0.5, 0.35)}}
    points["one expert"] = OperatingPoint(routing=(RoutingStage(layers=(1,) * layers),))
    first = None
    for name, point in points.items():
        found = answer_information(model, list(ids), point, 4)
        first = found.each if first is None else first
        say(name, nats=found.nats, interval=found.interval, lost=mean(first - found.each), limit=math.log(len(ids)))


def main() -> None:
    tasks: dict[str, Callable[[Task], None]] = {"scmoe": scmoe, "des": des, "concise": concise, "rewiring": rewiring}
    texts: dict[str, Callable[[Path], None]] = {"ranks": ranks, "ems": ems, "information": information}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path("build/nano-steps"))
    parser.add_argument("--only", type=lambda t: t.split(","), default=list(tasks))
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--longer", action="store_true")
    parser.add_argument("--temperature", type=float, help="of drawn answers; default 1.75, with --longer 1")
    args = parser.parse_args()
    for name in args.only:
        if name in texts:
            texts[name](args.folder)
        elif name in tasks:
            warm = args.temperature or (1.0 if args.longer else 1.75)
            tasks[name](Task(args.folder, args.data, args.problems, longer=args.longer, temperature=warm))
        else:
            parser.error(f"'{name}' is none of {', '.join([*tasks, *texts])}")


if __name__ == "__main__":
    main()
