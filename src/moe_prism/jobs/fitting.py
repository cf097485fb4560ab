"""What commands share that change experts by what calibration text says of them: one model, and its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..artefact.source import Weights
from ..calibrate.statistics import Statistics
from ..checkpoint import Journal, OutputFolder, read_manifest, source_facts
from ..checkpoint.manifest import MANIFEST
from ..data import Windows
from ..errors import UsageError
from ..forecast.work_time import Seconds
from ..model import resolve
from ..model.place import recorded
from ..options.compress import CompressOptions, pinned
from ..progress import Report, peak_rss_bytes
from ..result import Result
from .calibrate import calibration_windows, check_fit, check_fits, read_statistics, run_pass
from .resources import needed_by_pass, needed_by_rewriting
from .which_text import with_text


@dataclass(frozen=True)
class Refitted(Result):
    """method: as it was asked; expert_bytes: in the files, before and after; facts: what stays; needed: by the run."""

    counted: ClassVar[str]
    """What the facts are about, and their name in JSON."""
    method: str
    expert_bytes: tuple[int, int]
    facts: Mapping[str, Any]
    needed: Mapping[str, Any]
    folder: Path | None = None
    manifest: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `compress --json` prints."""
        before, after = self.expert_bytes
        left = {"left_out": self.manifest["companions"]["left_out"]} if self.manifest else {}
        return {
            **({"folder": str(self.folder)} if self.folder else {}),
            "method": self.method,
            "expert_bytes": {"before": before, "after": after},
            self.counted: dict(self.facts),
            **({} if self.folder else {"needed": dict(self.needed)}),
            **left,
            "peak_rss_bytes": peak_rss_bytes(),
        }


class Fitting:
    """One model that is written again, and the text of the pass if there has to be one.

    collectors: what is read of a calibration; calibration: a folder that holds one. UsageError, CorruptError or DoesNotFit for what cannot
    be done, before a weight is read.
    """

    def __init__(
        self, model: str | Path, options: CompressOptions, collectors: Sequence[str], calibration: str | Path | None
    ) -> None:
        where = resolve(model)
        self.asked, self.collectors = recorded(options), list(collectors)
        if not self.collectors and (calibration or options.calibration != CompressOptions().calibration):
            raise UsageError(f"'{options.method}' reads no text, so a calibration means nothing", "leave it out")
        settings = replace(options.calibration, collectors=self.collectors or ["counts"])
        self.options = replace(options, calibration=with_text(settings, where))
        if where.is_dir() and (where / MANIFEST).is_file() and read_manifest(where).get("kind") == "elastic":
            raise UsageError(
                "neurons of an elastic folder are in the order of its sub-experts", "compress its source, then refactor that"
            )
        self.weights = Weights(where, options.dtype)
        if self.weights.stream is None:
            raise UsageError(
                "a GGUF file is not written again", "load it with transformers' gguf_file=, save_pretrained, compress that"
            )
        self.stream = self.weights.stream
        self.weights.check_rewritable()
        self.given = read_statistics(calibration) if calibration and self.collectors else None
        if self.given and self.given.facts["source"] != source_facts(self.weights.path):
            raise UsageError(
                f"'{calibration}' was calibrated on another checkpoint", "calibrate this one, or leave --calibration out"
            )
        if self.given:
            check_fits(self.given, self.weights)
        self.windows: Windows | None = None

    def read_text(self) -> None:
        """The last check, since it is the longest."""
        if self.collectors and not self.given:
            self.windows = calibration_windows(self.weights.path, self.options.calibration)
            check_fit(self.weights, self.options.calibration)

    def needed_for(self, before: int, after: int) -> dict[str, Any]:
        """Memory and disk of the run. before, after: bytes of the experts in the files."""
        size = (self.weights.written_bytes or 0) - before + after
        return (
            needed_by_pass(self.weights, self.options.calibration, size)
            if self.windows
            else needed_by_rewriting(self.weights, size)
        )

    def lasts(self, written: int) -> Seconds | None:
        """How long it takes to pass over the text, to read every layer twice, to look and to write, and to write so many bytes."""
        from .job_times import rewriting_time  # a real run wants none of it

        passed = (self.windows, self.options.calibration) if self.windows else None
        return rewriting_time(self.weights.path, passed, written, reads=2)

    @property
    def documents(self) -> Sequence[str]:
        """SHA-256 of the calibration documents that were used."""
        return self.windows.documents if self.windows else self.given.facts["documents"] if self.given else ()

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the bytes."""
        return {
            "source": source_facts(self.weights.path),
            "compression": self.asked,
            "statistics": self.given.facts if self.given else None,
        }

    @property
    def pins(self) -> list[tuple[int, int]]:
        """(layer, expert) of what the user wants to stay."""
        return [pinned(text) for text in self.options.pin]

    def gathered(self, folder: OutputFolder, journal: Journal, report: Report) -> Statistics | None:
        """From the folder that was given, or from a pass, a unit of the journal. None: nothing is read of any text."""
        if self.windows is None:
            return self.given
        return run_pass(self.weights.path, self.windows, self.options.calibration, folder, journal, report)

    def values(self, statistics: Statistics | None) -> list[Mapping[str, Any]]:
        """Of every layer: collector -> statistic -> tensor."""
        return [own.values for own in statistics.layers] if statistics else [{} for _ in self.weights.layers]


def least_tokens(statistics: Statistics | None) -> int | None:
    """The fewest tokens any expert was chosen for; below some hundred its neurons are ranked by little."""
    found = [
        own["count"] for layer in (statistics.layers if statistics else ()) for own in layer.values.values() if "count" in own
    ]
    return min((int(count.min()) for count in found), default=None)
