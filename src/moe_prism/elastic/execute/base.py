"""The contract of an executor: what computes the kept slots of a layer, and where its weights lie.

Shapes: T tokens, k experts per token, N sub-experts per expert, d hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ...routing.base import Factors
from ..compensate import Compensator


class Candidates(Protocol):
    """What an executor may ask of a selection (`elastic.select`)."""

    @property
    def index(self) -> Tensor: ...

    @property
    def weight(self) -> Tensor: ...

    def widths(self, most: float = 1.0) -> Tensor | None:
        """[T, k, N]: bits of every slot, 0 where it is dropped; None where all are read as they are stored. most: as of `keep`."""

    def keep(self, most: float = 1.0) -> Tensor:
        """keep [T, k, N]; most: a budget that no token may pass."""

    def values(self) -> Tensor:
        """[T, k, N]: what each slot is worth, -1 where there is no expert."""

    def fused(self, most: Any) -> Any:
        """The arguments of the compiled selection; None where it is not of that kind."""


@dataclass
class WholeCalls:
    """Calls of a layer that dropped slots, and those of them in which whole experts were computed all the same: that took less time."""

    calls: int = 0
    whole: int = 0


@dataclass(slots=True, eq=False)
class Settled:
    """What will be computed. keep [T, k, N]; low [E, N]: blocks taken in their smaller form; prepared: the executor's own.

    widths [T, k, N]: bits of every slot, None where all are as they are stored. cutoff [T]: neurons with a smaller gate are not computed.
    factors: what tokens multiply inside their experts.
    """

    keep: Any  # a tensor; None only where everything is computed by the model itself
    low: Any = None
    prepared: Any = None
    widths: Tensor | None = None
    cutoff: Tensor | None = None
    factors: Factors | None = None


Again = Callable[[Tensor, Tensor, Tensor, Any], Tensor | None]
"""(x [T, d], weight, index [T, k], the past of the forward's requests) -> [T, d]; None: call the parts."""


class Executor(ABC):
    """Computes the kept slots of one layer."""

    skips_neurons: ClassVar[bool] = False
    """Whether it can leave out single neurons (`run_above`), and multiply inside experts (`run_scaled`)."""

    @cached_property
    def tally(self) -> WholeCalls:
        """What this executor did so far."""
        return WholeCalls()

    def always_selects(self, tokens: int | None = None) -> bool:
        """Whether even tokens that keep every slot are selected for: `settle` may then drop some all the same.

        tokens: of so many; None: of any number.
        """
        return False

    @property
    def low_bytes(self) -> int | None:
        """Bytes of a block in its smaller form; None where there is none."""
        return None

    def forget(self) -> None:  # noqa: B027 - most hold nothing
        """Give up what was made of the weights, which have changed."""

    def widened(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d] and weight [T, k] in the type that slots are chosen and computed in: float32 where that is faster than their own."""
        return x, weight

    def whole(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        """All experts of the router's own choice [T, d]; None where that is no different from keeping every slot."""
        return None

    def take(self, codec: Any, parts: Sequence[Any]) -> None:  # noqa: B027 - most executors have no use for it
        """Hear that the layer's weights are those that a codec decodes from these parts, until it hears of none."""

    def at_once(self, selection: Any, extra: Compensator | None) -> tuple[Tensor, Tensor] | None:
        """(output [T, d] with what makes up for dropped slots, keep [T, k, N]) of a `select.Selection`; None: call the parts instead."""
        return None

    def again(self, selection: Any, extra: Compensator | None) -> Again | None:
        """What does `at_once` for other rows at the same operating point, or, for no selection, `whole`; None where nothing does."""
        return None

    def settle(self, candidates: Candidates) -> Settled:
        """What is kept of the candidates: what the rule says, unless where the weights lie has a say."""
        widths = candidates.widths()
        return Settled(candidates.keep()) if widths is None else Settled(widths > 0, widths=widths)

    def run_above(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> tuple[Tensor, Tensor, Tensor]:
        """`run` without neurons below `settled.cutoff`; and how many that were [E, N], over tokens and over what a batch reads once."""
        raise NotImplementedError("points that skip neurons are refused where there is no other executor")

    def run_scaled(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        """`run` with `settled.factors`."""
        raise NotImplementedError("points that multiply inside experts are refused where there is no other executor")

    @abstractmethod
    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        """[T, d]: the sum over kept slots of weight x output, with the output bias of experts that keep any. weight [T, k]."""

    def coded(self, bits: Any) -> Any:
        """The layer in planes as a point's `SlotBits` have it, where that is no encoding of weights in memory; None where it is."""
        return None

    def run_at(self, coded: Any, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        """The same with slots of several widths (`settled.widths`) of a `coded.CodedLayer`."""
        raise NotImplementedError("points with bits per slot are refused where there is no other executor")
