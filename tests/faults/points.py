"""Points at which a fault can be put into a run: `with fault("write", raising(OSError(28, "")), at=3)`.

A point is a seam of the package by name. The fault is put in front of it from here, so what ships has neither the points nor their
price. test_points.py holds that each is passed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Point:
    """Where: `module:attribute` or `module:Class.method`."""

    where: str
    what: str

    def home(self) -> tuple[Any, str]:
        """(who has it, its name)."""
        module, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        return owner, name


POINTS = {
    "write": Point("moe_prism.checkpoint.atomic:OutputFolder.save_tensors", "a file of tensors is about to be written"),
    "sync": Point("moe_prism.checkpoint.atomic:os.fsync", "what was written is about to be made durable"),
    "note": Point("moe_prism.checkpoint.journal:Journal.finish", "a unit of work is on disk and about to be noted"),
    "rename": Point("moe_prism.checkpoint.atomic:OutputFolder.finish", "the result is about to become visible"),
    "layer": Point("moe_prism.jobs.refactor:solve", "a layer is about to be solved"),
    "logits": Point(
        "moe_prism.serve.engine.runner:Runner._prompt_logprobs", "a step has its logits, and nothing is drawn from them"
    ),
}


@dataclass
class Seen:
    """How often a point was passed."""

    times: int = 0


@contextmanager
def fault(name: str, do: Callable[..., object], at: int | None = None) -> Iterator[Seen]:
    """The `at`-th time a run comes to a point, or every time, `do` is called with what the seam gets; it may raise."""
    owner, attribute = POINTS[name].home()
    real, seen = getattr(owner, attribute), Seen()

    def first(*args: Any, **kwargs: Any) -> Any:
        seen.times += 1
        if at in (None, seen.times):
            do(*args, **kwargs)
        return real(*args, **kwargs)

    with mock.patch.object(owner, attribute, first):
        yield seen


def raising(error: BaseException) -> Callable[..., object]:
    """`do` of a fault that is an error."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
