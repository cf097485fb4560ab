"""What storing a model's experts in less is asked for: in fewer bits, or without some of their neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from .base import Options, WrittenType, check_method, nested, option
from .calibrate import CalibrateOptions

OutputFormat = Literal["compressed-tensors", "records"]
NeuronScope = Literal["model", "layer", "expert"]
Widths = Literal["equal", "own"]


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Options):
    """How experts are stored, and in which form they are written.

    >>> import moe_prism
    >>> moe_prism.CompressOptions(method="rtn:bits=8").format
    'compressed-tensors'
    """

    method: str = option(
        "rtn:bits=4:group=128",
        "A codec and its settings, such as rtn:bits=8 or rtn:bits=4:group=32; eaquant:bits=4:group=128 evens out inputs first; what ranks "
        "neurons, such as heapr, or merges experts, such as dern, with --keep.",
    )
    format: OutputFormat = option(
        "compressed-tensors",
        "Of codecs: compressed-tensors, which unmodified transformers and vLLM load (rtn and eaquant of 4 and 8 bits); or records, "
        "one file of sub-experts that --expert-file reads, of a folder that refactor wrote: --method int8-rows, or nested:bits=8:group=32, "
        "of whose planes a slot reads what it needs.",
    )
    error_feedback: bool = option(
        False,
        "Of codecs: round column after column, and make up for what is lost in the columns that follow, as calibration text uses them "
        "(GPTQ).",
    )
    keep: float | None = option(
        None, "Of neurons, and of experts that are merged: the share that stays, 0 to 1.", above=0, most=1
    )
    widths: Widths = option(
        "equal",
        "Of neurons. equal: every expert has one width, which config.json says, and the files become smaller. own: experts differ as "
        "the method wants, with zeros for neurons that go, and the files stay as large.",
    )
    multiple: int = option(16, "Of --widths equal: the width is a multiple of it.", least=1)
    protect: list[str] = option(
        [],
        "Comma-separated protections, e.g. super-experts: experts that stay as they are whatever the method says. Of neurons with --widths "
        "own.",
        names="moe_prism.compress.prune:protections",
    )
    pin: list[str] = option(
        [], "Comma-separated LAYER:EXPERT that stay as they are, counted from 0. Of neurons with --widths own."
    )
    dtype: WrittenType | None = option(
        None, "Of neurons and merging: type that a quantized source's weights are written in. Default its own."
    )
    calibration: CalibrateOptions = nested(CalibrateOptions, "text", "text_field", "domains", "tokens", "length", "low_memory")

    def check(self) -> None:
        super().check()
        if self.format != "records":  # which takes codecs of another registry, too
            check_method(self.method, None, "method")  # one that does not act on weights has an error of its own
        for text in self.pin:
            pinned(text)
        if self.widths == "own" and self.multiple != CompressOptions.multiple:
            raise UsageError("--multiple belongs to --widths equal", "leave one of them out")
        self.calibration.check()

    def check_codec(self, *, fitted: bool) -> None:
        """UsageError for what a codec does not know. fitted: whether calibration text decides anything."""
        self._check_default(("keep", "widths", "multiple", "protect", "pin", "dtype"), "give a method that ranks neurons")
        if not fitted:
            self._check_default(("calibration",), "add --error-feedback")

    def check_neurons(self) -> None:
        """UsageError for what a ranking of neurons does not know."""
        self._check_default(("format", "error_feedback"), "give a codec, such as rtn:bits=4")
        if self.widths == "equal" and (self.protect or self.pin):
            raise UsageError(
                "with --widths equal all experts lose as many neurons", "add --widths own, or leave --protect and --pin out"
            )

    def check_merging(self) -> None:
        """UsageError for what merging experts does not know."""
        self._check_default(("format", "error_feedback"), "give a codec, such as rtn:bits=4")
        self._check_default(("widths", "multiple"), "give a method that ranks neurons")

    def _check_default(self, names: Sequence[str], advice: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(CompressOptions(), name):
                flag = "--text, --tokens or --length" if name == "calibration" else f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} means nothing to '{self.method}'", f"leave it out, or {advice}")


def pinned(text: str) -> tuple[int, int]:
    """(layer, expert) of "3:12". UsageError for anything else."""
    layer, colon, expert = text.partition(":")
    if not colon or not (layer.isdigit() and expert.isdigit()):
        raise UsageError(f"--pin '{text}' names no expert", "write LAYER:EXPERT, such as 3:12")
    return int(layer), int(expert)
