"""What can be compared on one frontier: a method turns a loaded model into candidates, and all candidates are measured the same way.

A method is one file and one line of `methods`. It sees the loaded model through `Subject`, does its fitting (on calibration text only)
while it makes its candidates, and says in each how the model is to run: a `Setting`, and a context manager that puts whatever else is
needed on the model and takes it off exactly. The selection rules of `elastic.rules` are methods too, by their own names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ..elastic import Elastic
from ..elastic.rules import rules
from ..elastic.runtime import Setting
from ..errors import UsageError
from ..progress import Report, silent
from ..registry import Registry, choices


@dataclass
class Subject:
    """The model that is measured. k experts per token, n_sub sub-experts per expert (1: a plain checkpoint, whole experts only).

    `read_calibration` gives token windows [n, length] of text that is not in the evaluation; it is called at most once, when a method asks.
    """

    model: Any
    tokenizer: Any
    elastic: Elastic
    n_sub: int
    k: int
    read_calibration: Callable[[], Tensor]
    points: int | None = None
    report: Report = silent
    cache: dict[str, Any] = field(default_factory=dict)
    """What one method measured and another may use again; the key names the measurement and its parameters."""

    @cached_property
    def calibration(self) -> Tensor:
        """Token ids [n, length] to fit on."""
        return self.read_calibration()

    @property
    def slots(self) -> int:
        """Slots per token and layer at full budget, k * n_sub."""
        return self.k * self.n_sub


@dataclass(frozen=True)
class Candidate:
    """One operating point to measure. name: short and unique on the frontier, e.g. "product-8".

    install: called for every batch of windows, so entering and leaving must be quick; what is slow belongs before, where the candidate
    is made. Leaving restores the model to the bit. resident_share: expert weights that stay in memory / all expert weights, where the
    method removes some.
    """

    name: str
    setting: Setting = field(default_factory=Setting)
    install: Callable[[], AbstractContextManager[object]] = nullcontext
    resident_share: float = 1.0


class Method(ABC):
    """A way to make a model cheaper, at several prices. `argument` is what follows the colon in `prune:soft-count`."""

    needs_sub_experts: ClassVar[bool] = False
    """Whether the model must have been refactored."""

    def __init__(self, name: str, argument: str | None) -> None:
        self.name, self.argument = name, argument

    def refuse_argument(self) -> None:
        """UsageError if an argument was given: for methods that have none."""
        if self.argument is not None:
            plain = self.name.partition(":")[0]
            raise UsageError(f"method '{plain}' takes no argument, '{self.argument}' was given", f"write '{plain}'")

    @abstractmethod
    def candidates(self, subject: Subject) -> Sequence[Candidate]:
        """The points to measure, cheapest or dearest first. Raises UsageError where the model has no such points."""


methods: Registry[type[Method]] = Registry(
    "method",
    {
        "prune": (
            "moe_prism.methods.prune.masked:Prune",
            "expert pruning in mask mode: fewer experts in memory, as many per token; :CRITERION, :CRITERION-global, :CRITERION-measured",
        ),
        "uniform": ("moe_prism.methods.skip.base:Uniform", "expert skipping: the same number of experts in every layer"),
        "pattern-skip": (
            "moe_prism.methods.skip.base:PatternSkip",
            "expert skipping: counts along straight lines; :b-h-e-p, :descending (default), :ascending, :peak, :valley",
        ),
        "sensitivity": (
            "moe_prism.methods.skip.base:Sensitivity",
            "expert skipping: counts by what each layer loses, improved together; :alone, :isolated (Alloc-MoE) without that",
        ),
        "ser": ("moe_prism.methods.skip.base:Ser", "expert skipping per token: weights below a share of the largest; :K_MIN"),
        "naee": ("moe_prism.methods.skip.base:Naee", "the same with thresholds per layer and rank from calibration quantiles"),
        "score-mass": (
            "moe_prism.methods.skip.base:ScoreMassMethod",
            "expert skipping per token: the fewest experts that hold a share of the routing weight",
        ),
        "weight-level": (
            "moe_prism.methods.skip.base:WeightLevelMethod",
            "expert skipping per token: weights below the layer's calibrated level; :METHOD gives the counts",
        ),
        "batch-redistribution": (
            "moe_prism.methods.skip.base:Batch",
            "expert skipping per batch: a layer's budget goes to the largest weights; :METHOD gives the counts",
        ),
    },
)


def method(name: str) -> Method:
    """The method of a name as `--methods` takes it: a selection rule, or NAME or NAME:ARGUMENT of the registry."""
    plain, colon, argument = name.partition(":")
    if plain in methods.names():
        return methods.get(plain)(name, argument if colon else None)
    if plain in rules.names():
        from .slots.rules import RuleMethod

        return RuleMethod(name, argument if colon else None)
    raise UsageError(f"unknown method '{plain}'", choices(plain, [*rules.names(), *methods.names()]))
