"""The fit of one expert's predictor, against the five dense systems that it was first solved by, at the widths of large models.

    python benchmarks/ridge.py [--hidden 2048] [--rows 128,512,1024,2048] [--experts 2] [--turns 3] [--json]

All get the same random rows, and take turns; the least processor time counts, of one thread. `first` builds the products of the features
of the training rows and of all rows, and solves four systems of D unknowns and one. `exact` is the form in float64 that `today` falls
back to. `same` is the largest difference of coefficients of the first and today's, relative to the largest; it is large where they
chose two strengths.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_prism.elastic.scorers.ridge_fit import STRENGTHS, exact_fit, held_out, ridge_fit

Fit = Callable[[Tensor, Tensor], tuple[Tensor, Any]]


def first(z: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """(coefficients, number of the strength), by systems as wide as there are features."""
    out = held_out(len(z))
    stay = torch.ones(len(z), dtype=torch.bool)
    stay[out] = False
    train = _normal(z[stay], y[stay])
    errors = [((z[out] @ _solve(*train, strength) - y[out]) ** 2).sum() for strength in STRENGTHS]
    best = int(torch.stack(errors).argmin())
    return _solve(*_normal(z, y), STRENGTHS[best]), best


def _exact(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return exact_fit(z, y, held_out(len(z)))


def _normal(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of centred features, with the targets, and both means."""
    mean, target = z[:, :-1].mean(0), y.mean(0)
    centred = z[:, :-1] - mean
    return centred.T @ centred, centred.T @ (y - target), mean, target


def _solve(gram: Tensor, right: Tensor, mean: Tensor, target: Tensor, strength: float) -> Tensor:
    diagonal = strength * gram.diagonal().mean() + 1e-12
    slope = torch.linalg.solve(gram + diagonal * torch.eye(len(gram), dtype=gram.dtype), right)
    return torch.cat([slope, (target - mean @ slope)[None]], 0)


def spent(fit: Fit, given: list[tuple[Tensor, Tensor]]) -> float:
    """Processor seconds per expert."""
    began = time.process_time()
    for z, y in given:
        fit(z, y)
    return (time.process_time() - began) / len(given)


def measure(hidden: int, rows: int, asked: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    given = []
    for _ in range(asked.experts):
        x = torch.randn(rows, hidden, dtype=torch.float64, generator=generator)
        z = torch.cat([x, torch.ones(rows, 1, dtype=torch.float64)], 1)
        noise = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
        given.append((z, x @ torch.randn(hidden, 4, dtype=torch.float64, generator=generator) / hidden**0.5 + noise))
    both: dict[str, Fit] = {"first": first, "exact": _exact, "today": ridge_fit}
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(asked.turns):
        for name, fit in both.items():
            times[name].append(spent(fit, given))
    least = {name: min(found) for name, found in times.items()}
    old, new = first(*given[0])[0], ridge_fit(*given[0])[0]
    return {
        "hidden": hidden,
        "rows": rows,
        **{name: round(seconds, 4) for name, seconds in least.items()},
        "ratio": round(least["first"] / least["today"], 1),
        "of exact": round(least["exact"] / least["today"], 1),
        "same": float((old - new).abs().max() / old.abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[128, 512, 1024, 2048])
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for rows in asked.rows:
        found.append(measure(asked.hidden, rows, asked))
        if not asked.json:
            print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    if asked.json:
        print(json.dumps({"benchmark": "ridge", "rows": found}))


if __name__ == "__main__":
    main()
