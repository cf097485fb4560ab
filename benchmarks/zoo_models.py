"""Trained models of the zoo, by name and seed, and what they say on the same windows."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bootstrap import mean_interval
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_prism.architectures.base import LayerRouting
from moe_prism.data import token_windows
from moe_prism.jobs.train import train
from moe_prism.jobs.train_recipe import read_training
from moe_prism.model import load_model, load_tokenizer
from moe_prism.training.loop import Recorder

RECIPES = Path(__file__).parents[1] / "recipes" / "zoo"
LENGTH = 256
SLACK = 0.005  # of a loss that must not rise
BASE, PICTURES, TUNED = "top-k", "dit-moe", "adamoe-nano"
EXTRA = {
    "top-k-no-balance": (BASE, ("balance=0.0",)),
    "sigma-moe-no-schedule": ("sigma-moe", ("settings.first=1",)),
    "moe-plus-plus-capacity": ("moe-plus-plus", ("settings.capacity=1.1",)),
    "mote-dense": ("mote", ("settings.dense=1.0",)),
    "mote-full": ("mote", ("settings.ternary=false",)),
    "union-of-experts-data": ("union-of-experts", ("settings.selection=data",)),
    "union-of-experts-dense": ("union-of-experts", ("settings.unit=true", "model.active=8")),
    "graph-of-tokens-attention": ("graph-of-tokens", ("settings.by=attention",)),
}
"""Runs that a claim compares with: (recipe, changes)."""
LATE = 0.75
"""NAME-late is NAME stopped after this share of its steps, at the rates of the whole run."""
OF_TEXT = ("tokens=", "length=", "text=", "tokenizer=", "steps=", "batch=")
"""Changes that the recipe of pictures does not take: it has steps and a batch of its own."""
BUDGETS = (0.5, 0.25)
TIMES = 10


class Zoo:
    """Trained models by name and seed, and what they say on the same windows."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.ids = token_windows(load_tokenizer("nano"), "stdlib", "evaluation", length=LENGTH, tokens=args.tokens).ids

    def folder(self, name: str, seed: int) -> Path | None:
        """The checkpoint, trained if it may be; None where there is none."""
        out = self.work / f"{name}-{seed}"
        if not out.is_dir() and self.args.train:
            whole = name.removesuffix("-late")
            recipe, changes = EXTRA.get(whole, (whole, ()))
            fixed = OF_TEXT if recipe == PICTURES else ("model.",) if recipe == TUNED else ()
            asked = [change for change in self.args.set if not change.startswith(fixed)]
            every = [*asked, *changes, f"seed={seed}", *(self.args.pictures if recipe == PICTURES else ())]
            if whole != name:
                steps = read_training(RECIPES / f"{recipe}.yaml", every).steps
                every.append(f"stop={max(1, int(LATE * steps))}")
            train(RECIPES / f"{recipe}.yaml", out, changes=every, resume=True)
        return out if out.is_dir() else None

    @cache  # noqa: B019 - one of them lives as long as the process
    def model(self, name: str, seed: int) -> Any:
        folder = self.folder(name, seed)
        return None if folder is None else load_model(folder, torch.float32)

    @torch.no_grad()
    def losses(self, model: Any) -> NDArray[np.float64]:
        """Nats per token of every window."""
        found = []
        for row in self.ids:
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            found.append(float(nn.functional.cross_entropy(logits, row[1:])))
        return np.array(found)

    @torch.no_grad()
    def routings(self, model: Any) -> list[LayerRouting]:
        """Of every router, over all windows."""
        recorder = Recorder(model)
        every: list[list[LayerRouting]] = []
        for row in self.ids:
            with recorder.recording() as found:
                model(input_ids=row[None], use_cache=False)
            every.append(list(found))
        recorder.close()
        return [
            LayerRouting(*(torch.cat([getattr(r, part) for r in one]) for part in ("logits", "weights", "ids")))
            for one in zip(*every, strict=True)
        ]

    def against_base(self, name: str, seed: int, base: str = BASE) -> dict[str, Any]:
        """Loss, that of the model it is compared with, and their difference, window by window."""
        own, plain = self.losses(self.model(name, seed)), self.losses(self.model(base, seed))
        return {"loss": mean_interval(own), "loss_base": mean_interval(plain), "difference": mean_interval(own - plain)}


def load_of(routing: LayerRouting, columns: slice = slice(None)) -> float:
    """Largest / mean load of the experts: 1 where all are chosen as often."""
    share = routing.chosen[:, columns].sum(0)
    return round(float(share.max() / share.mean()), 3)


def information(first: Tensor, second: Tensor) -> float:
    """Mutual information in nats of two choices of one expert each [T]."""
    size = int(max(first.max(), second.max())) + 1
    joint = torch.bincount(first * size + second, minlength=size * size).double().view(size, size)
    joint = joint / joint.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / apart[there]).log()).sum())
