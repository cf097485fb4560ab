"""The contract of a method: it turns a loaded model into operating points, and all points are measured, run and served the same way.

A method is one file and one line of `catalogue`. It sees the model through `Subject`, does its fitting (on calibration text only) while it
makes its points, and says in each how the model is to run. A selection rule of `elastic.rules` and a pruning criterion are methods too:
`RuleMethod` and `Prune` stand between them and this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ..elastic import Elastic
from ..errors import UsageError
from ..options.skip import SkipOptions
from ..point import NamedPoint
from ..progress import Report, silent
from ..registry import choices


@dataclass(kw_only=True)
class Subject:
    """The model that is measured. k experts per token, n_sub sub-experts per expert (1: a plain checkpoint, whole experts only).

    `read_calibration` gives token windows [n, length] of text that is not in the evaluation; it is called at most once, when a method asks.
    points: how many a method with a continuous dial makes; None: its own number.
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

    @property
    def layers(self) -> int:
        """MoE layers of the model."""
        return len(self.elastic.layers)


@dataclass(frozen=True, kw_only=True)
class NoParameters:
    """For methods that have none."""


class Method(ABC):
    """A way to make a model cheaper, at several prices. name: as the user wrote it, with what follows the colon in `ser:2`."""

    acts: ClassVar[str]
    """Which part of an operating point it fills in: weights, routing, slots or decoding."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it is fitted on, in words for `moe-prism ls methods`."""
    paper: ClassVar[str] = ""
    """Where it comes from; empty: our own."""
    depends_on_batch: ClassVar[bool] = False
    """Whether what a token gets depends on the other tokens of its batch: never served unless it is named."""
    needs_sub_experts: ClassVar[bool] = False
    """Whether the model must have been refactored."""
    Parameters: ClassVar[type[Any]] = NoParameters
    """A frozen dataclass; its fields are what a user may set."""

    def __init__(self, name: str, parameters: Any) -> None:
        self.name, self.parameters = name, parameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> Any:
        """The parameters that the text after the colon says; None: nothing was said. UsageError where it says nothing that is known.

        Here: the value of the first field, a number or a name; or `name=value` for any of them, with colons between. Methods without
        parameters take no text.
        """
        known = fields(cls.Parameters)
        if text is None:
            return cls.Parameters()
        if not known:
            plain = name.partition(":")[0]
            raise UsageError(f"method '{plain}' takes no argument, '{text}' was given", f"write '{plain}'")
        legal, found = {f.name: str(f.type) for f in known}, {}
        for part in text.split(":") if "=" in text else [f"{known[0].name}={text}"]:
            field_name, equals, value = part.partition("=")
            if not equals or field_name not in legal:
                raise UsageError(f"'{part}' of '{name}' sets nothing", f"write NAME=VALUE, with {choices(field_name, legal)}")
            found[field_name] = _value(name, value, legal[field_name])
        return cls.Parameters(**found)

    @classmethod
    def written(cls, name: str) -> str:
        """How a user writes the method, with the names of its parameters in capitals where they stand in the name."""
        known = fields(cls.Parameters)
        return f"{name}:{known[0].name.upper()}" if known else name

    @classmethod
    def set_by(cls, name: str, parameter: str) -> str:
        """How a user writes a parameter that does not stand in the name."""
        if cls.acts in ("weights", "decoding") or parameter not in {f.name for f in fields(SkipOptions)}:
            return f"{name}:{parameter}={parameter.upper()}"
        return f"moe-prism skip --{parameter.replace('_', '-')}"

    @classmethod
    def example(cls) -> str | None:
        """What follows the colon where the generic tests try the method; None: nothing does."""
        return None

    @abstractmethod
    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        """The points to measure, cheapest or dearest first. Raises UsageError where the model has no such points.

        Names are short and unique on a frontier, e.g. "product-8".
        """


def check_kept(name: str, keep: float) -> None:
    """UsageError for a share that a method may keep of something; 0: it is not said."""
    if keep and not 0 < keep <= 1:
        raise UsageError(f"'{name}' keeps no share between 0 and 1", "write such as keep=0.75")


def _value(name: str, text: str, kind: str) -> int | float | bool | str:
    """A parameter as it is written in a method's name."""
    if kind.startswith("int"):
        if not text.isdigit():
            raise UsageError(f"'{text}' of '{name}' is no whole number", "give one, such as 2")
        return int(text)
    if kind.startswith("float"):
        try:
            return float(text)
        except ValueError as error:
            raise UsageError(f"'{text}' of '{name}' is no number", "give one, such as 2.5") from error
    if kind == "bool":
        if text not in ("true", "false"):
            raise UsageError(f"'{text}' of '{name}' is neither true nor false", "give one of them")
        return text == "true"
    return text
