"""Statistics that several processes or machines gathered from parts of one text, made into those of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from ..artefact.load import read_tensors
from ..artefact.output import Writing, check_apart, finished
from ..artefact.source import Weights
from ..calibrate.options import settings
from ..calibrate.run import Pass
from ..calibrate.statistics import LayerStatistics, Statistics
from ..checkpoint import OutputFolder, check_listed, read_manifest, source_facts
from ..errors import CorruptError, UsageError
from ..model import resolve
from ..model.place import recorded
from ..options.calibrate import CalibrateOptions
from .calibrate import PROFILE, check_fits, read_statistics, write_statistics
from .which_text import with_text

AGAIN = "calibrate this part again"


def join_calibrations(
    model: str | Path,
    out: str | Path,
    parts: Sequence[str | Path],
    options: CalibrateOptions | None = None,
    **how: Unpack[Writing],
) -> Statistics:
    """Write the statistics of all parts to `out`, as one `calibrate_model` would have. parts: folders of `calibrate_part`, all of them.

    Samples and counts are those of one pass, to the byte. Sums of fractions are added in another order, and differ in their last bits.
    Raises UsageError for parts of something else or one that is missing, CorruptError for a damaged one.

    >>> import moe_prism
    >>> moe_prism.join_calibrations("nano", "all", [], moe_prism.CalibrateOptions(text="stdlib"))
    Traceback (most recent call last):
    moe_prism.errors.UsageError: there are no parts to join; give the --out of every `calibrate --shard`
    """
    options, resume, force = options or CalibrateOptions(), how.get("resume", False), how.get("force", False)
    options.check()
    where = resolve(model)
    options = with_text(options, where)
    for part in (where, *parts):
        check_apart(part, out)
    inputs = {"source": source_facts(where), "options": recorded(options)}
    if resume and finished(out, {"kind": "calibration", **inputs}):
        return read_statistics(out)
    manifests = [read_manifest(part) for part in parts]
    order = _order(parts, manifests, inputs)
    weights = Weights(where)
    work = Pass(weights.model, weights.layers, settings(options))
    facts = {key: value for key, value in manifests[order[0]]["facts"].items() if key != "part"}
    if work.capacity != facts["capacity"] or [layer.name for layer in work.layers] != facts["layers"]:
        raise UsageError("the parts are of another model or reservoir", "calibrate all parts with the same options")
    profiles = [_merge(work, Path(parts[i]), manifests[i]) for i in order]
    if any(not profile.equal(profiles[0]) for profile in profiles):
        raise CorruptError("the parts were made of different text", "calibrate all parts of the same files")
    work.done, work.profile = facts["windows"], profiles[0]
    with OutputFolder(out, resume=resume, force=force) as folder:
        found = work.statistics(facts)
        check_fits(found, weights)
        write_statistics(folder, found, inputs)
    return found


def _order(parts: Sequence[str | Path], manifests: Sequence[dict[str, Any]], inputs: dict[str, Any]) -> list[int]:
    """Which of the folders is the first part, the second, ... UsageError where they are not all parts of one calibration."""
    if not parts:
        raise UsageError("there are no parts to join", "give the --out of every `calibrate --shard`")
    place: dict[int, int] = {}
    for i, (part, manifest) in enumerate(zip(parts, manifests, strict=True)):
        known = manifest.get("facts", {}).get("part") if manifest.get("kind") == "calibration" else None
        if known is None:
            raise UsageError(f"'{part}' is no part of a calibration", "give the --out of a `moe-prism calibrate --shard`")
        for name, what in (("source", "another checkpoint"), ("options", "other options")):
            if manifest[name] != inputs[name]:
                raise UsageError(f"'{part}' was calibrated with {what}", "give all parts, and --join, the same model and options")
        if known[1] != manifests[0]["facts"]["part"][1] or known[0] in place:
            raise UsageError(
                f"'{part}' is part {known[0] + 1} of {known[1]}, which does not go with the others", "give each part once"
            )
        place[known[0]] = i
    count = manifests[0]["facts"]["part"][1]
    missing = next((number for number in range(count) if number not in place), None)
    if missing is not None:
        raise UsageError(f"part {missing + 1} of {count} is missing", f"make it with --shard {missing + 1}/{count}")
    return [place[number] for number in range(count)]


def _merge(work: Pass, folder: Path, manifest: dict[str, Any]) -> Tensor:
    """Take in what a part gathered; the windows that it kept for later runs."""
    check_listed(folder, manifest, sorted(manifest["files"]))
    for i, layer in enumerate(work.layers):
        path = folder / f"layer-{i:03d}.safetensors"
        found = LayerStatistics.unflat(layer.name, read_tensors(path))
        found.check(str(path), work.capacity, {"E": layer.num_experts, "d": layer.hidden})
        for key, collector in work.collectors[i].items():
            domain, _, name = key.rpartition("/")
            state = (found.domains.get(domain, {}) if domain else found.values).get(name)
            if state is None:
                raise CorruptError(f"{path} has no statistics '{key}'", AGAIN)
            collector.merge(state)
    profile = read_tensors(folder / PROFILE).get("ids")
    if profile is None:
        raise CorruptError(f"{folder / PROFILE} has no token ids", AGAIN)
    return profile
