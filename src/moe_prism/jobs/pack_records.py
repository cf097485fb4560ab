"""Write the experts of an elastic folder as the store reads them: one record per sub-expert, and its 8-bit form beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artefact.output import check_apart
from ..checkpoint import LayerStream, elastic_manifest
from ..errors import UsageError
from ..model import find_layers
from ..options.compress import CompressOptions
from ..progress import Report
from ..store.layout import RecordLayout
from ..store.pack import write_pack

CODEC = "int8-rows"
ADVICE = f"give --method {CODEC}, which records are read in where they are missed"


def records(folder: str | Path, options: CompressOptions) -> tuple[int, tuple[int, int]]:
    """(records, bytes of all as they are and in their 8-bit form). UsageError for a folder, or a method, that has no records."""
    if options.method != CODEC or options.error_feedback:
        raise UsageError(f"'{options.method}' has no form in records", ADVICE)
    manifest = elastic_manifest(folder)
    layers, parts = find_layers(LayerStream(folder).model), manifest["n_sub"]
    layout, count = RecordLayout.of(layers[0], parts), sum(layer.num_experts for layer in layers) * parts
    return count, (count * layout.bytes, count * layout.low_bytes)


def write_records(folder: str | Path, out: str | Path, report: Report, *, force: bool) -> dict[str, Any]:
    """The packed file at `out`, complete or not at all; the folder's manifest. What `generate --expert-file` takes."""
    path = Path(out)
    check_apart(folder, path)
    if path.exists() and not (force and path.is_file()):
        raise UsageError(f"'{out}' exists already", "choose another --out, or give --force to replace a file")
    manifest = elastic_manifest(folder)
    with report("write") as update:
        write_pack(folder, path, manifest, low=True, progress=update)
    return manifest
