"""Compression with training between or after its cuts, on nano: SlimMoE's stages, MC-SMoE's tuning, and a student in 3 MB (Compressor).

    python benchmarks/stages.py --work FOLDER [--only slim,mc-smoe,compressor] [--steps 60] [--student-steps 300] [--batch 4]
                                [--tokens 8192] [--seeds 0] [--quick] [--json]

Everything is trained on the standard library's programs that nano was trained on, and judged on its evaluation side. KL is to nano, in nats
per token; intervals are 95 %, bootstrap over windows of 256 tokens. `one cut` and `two cuts` have the same width in the end and the same
steps in all. A folder that is there is not made again. --quick makes two steps of everything: it shows that the command works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bootstrap import mean_interval
from numpy.typing import NDArray
from printed import printed

from moe_prism.data import token_windows
from moe_prism.jobs.compress import compress_model
from moe_prism.jobs.train import train
from moe_prism.model import load_model, load_tokenizer
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.compress import CompressOptions

LENGTH = 256
KEEP = 0.5
FIRST = 0.75  # of the neurons, after the first of two cuts
BYTES = 3_000_000
RATES = {"rate_matrix": 0.002, "rate_rest": 4e-4}


class Stages:
    """Folders by name, and what they say on the same windows."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.ids = token_windows(load_tokenizer("nano"), "stdlib", "evaluation", length=LENGTH, tokens=args.tokens).ids
        teacher = load_model("nano", torch.float32)
        with torch.no_grad():
            self.nano = [teacher(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1) for row in self.ids]

    def cut(self, source: str | Path, name: str, method: str, keep: float) -> Path:
        """A compressed copy."""
        out = self.work / name
        if not out.is_dir():
            calibration = CalibrateOptions(text="stdlib", tokens=4096, length=LENGTH)
            compress_model(source, out, CompressOptions(method=method, keep=keep, calibration=calibration))
        return out

    def tuned(self, source: str | Path, name: str, steps: int, seed: int) -> Path:
        """The same, trained to say what nano says."""
        out = self.work / f"{name}-{seed}"
        train({**self._how(steps, seed), **RATES, "start": str(source), "teacher": "nano"}, out, resume=True)
        return out

    def student(self, name: str, distil: float, seed: int) -> Path:
        """A model of its own in BYTES."""
        out = self.work / f"{name}-{seed}"
        asked = {"architecture": "top-k", "bytes": BYTES, "store": "bfloat16", "teacher": "nano", "distil": distil}
        train({**self._how(self.args.student_steps, seed), **asked}, out, resume=True)
        return out

    def _how(self, steps: int, seed: int) -> dict[str, Any]:
        every = {"text": ["stdlib"], "tokens": 400_000, "length": LENGTH, "batch": self.args.batch, "judge_every": 100_000}
        return {**every, "steps": steps, "seed": seed}

    @torch.no_grad()
    def row(self, claim: str, name: str, folder: Path) -> tuple[dict[str, Any], NDArray[np.float64]]:
        """What a model comes to, and its KL of every window."""
        model = load_model(folder, torch.float32)
        kl, nats = [], []
        for ids, theirs in zip(self.ids, self.nano, strict=True):
            own = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            kl.append(float((theirs.exp() * (theirs - own)).sum(-1).mean()))
            nats.append(float(-own[:-1].gather(1, ids[1:, None]).mean()))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = {
            "claim": claim,
            "model": name,
            "bytes": size,
            "kl": mean_interval(np.array(kl)),
            "loss": mean_interval(np.array(nats)),
        }
        return found, np.array(kl)


def slim(stages: Stages, seed: int) -> Iterator[tuple[str, Path]]:
    """One cut and training, or two cuts with half of the training after each."""
    steps = stages.args.steps
    once = stages.cut("nano", "slim-once", "slim", KEEP)
    yield "cut, not trained", once
    yield "one cut", stages.tuned(once, "slim-once-tuned", steps, seed)
    half = stages.tuned(stages.cut("nano", "slim-first", "slim", FIRST), "slim-first-tuned", steps // 2, seed)
    again = stages.cut(half, f"slim-second-{seed}", "slim", KEEP / FIRST)
    yield "two cuts", stages.tuned(again, "slim-second-tuned", steps - steps // 2, seed)


def mc_smoe(stages: Stages, seed: int) -> Iterator[tuple[str, Path]]:
    """Merged experts, and the same trained: those that are one stay one."""
    merged = stages.cut("nano", "m-smoe", "m-smoe", KEEP)
    yield "merged, not trained", merged
    yield "merged and trained", stages.tuned(merged, "m-smoe-tuned", stages.args.steps, seed)


def compressor(stages: Stages, seed: int) -> Iterator[tuple[str, Path]]:
    """A student by the next token alone, and one that also follows nano."""
    yield "student, not distilled", stages.student("student-alone", 0.0, seed)
    yield "student, distilled", stages.student("student", 1.0, seed)


CLAIMS: Mapping[str, Callable[[Stages, int], Iterator[tuple[str, Path]]]] = {
    "slim": slim,
    "mc-smoe": mc_smoe,
    "compressor": compressor,
}


def rows(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    stages = Stages(args, work)
    for claim in args.only.split(","):
        for seed in map(int, args.seeds.split(",")):
            before: NDArray[np.float64] | None = None
            for name, folder in CLAIMS[claim](stages, seed):
                found, kl = stages.row(claim, name, folder)
                less = {} if before is None else {"kl_less_the_row_above": mean_interval(kl - before)}
                yield {"seed": seed, **found, **less}
                before = kl


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['claim']:10} seed {row['seed']}  {row['model']:24} {row['bytes']:>11,} bytes  KL {row['kl']}  loss {row['loss']}"
        + (f"  less the row above {row['kl_less_the_row_above']}" if "kl_less_the_row_above" in row else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default=",".join(CLAIMS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--student-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = next((name for name in args.only.split(",") if name not in CLAIMS), None)
    if unknown is not None:
        parser.error(f"no claim '{unknown}': choose from {', '.join(CLAIMS)}")
    torch.set_num_threads(1)
    if args.quick:
        args.steps = args.student_steps = 2
        args.batch, args.tokens = 2, 1024
    with tempfile.TemporaryDirectory() as scratch:
        found = printed(rows(args, args.work or Path(scratch)), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "stages", "rows": found}))


if __name__ == "__main__":
    main()
