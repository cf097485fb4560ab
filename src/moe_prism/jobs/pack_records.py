"""Write the experts of an elastic folder as the store reads them: a record per sub-expert and its 8-bit form beside it, or its planes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artefact.output import check_apart
from ..checkpoint import LayerStream, elastic_manifest
from ..compress.codec.nested import Nested
from ..errors import UsageError
from ..methods.find import method
from ..methods.quantize.uniform_bits import UniformBits
from ..model import find_layers
from ..options.compress import CompressOptions
from ..progress import Report
from ..store.layout import RecordLayout
from ..store.pack import write_pack
from ..store.plane_layout import PlaneLayout, PlaneStorage

CODEC = "int8-rows"
ADVICE = f"give --method {CODEC}, which misses may be read in, or nested:bits=8:group=32, of which a slot reads what it needs"


def records(folder: str | Path, options: CompressOptions) -> tuple[int, tuple[int, int]]:
    """(records, bytes of the sub-experts as they are and as they are packed in fewer bits).

    UsageError for a folder, or a method, that has no records.
    """
    planes = storage_of(options)
    manifest = elastic_manifest(folder)
    layers, parts = find_layers(LayerStream(folder).model), manifest["n_sub"]
    layout, count = RecordLayout.of(layers[0], parts), sum(layer.num_experts for layer in layers) * parts
    if planes is None:
        return count, (count * layout.bytes, count * layout.low_bytes)
    packed = PlaneLayout.of(layers[0], parts * PlaneLayout.planes, planes)
    return count * packed.planes, (count * layout.bytes, count * packed.planes * packed.bytes)


def storage_of(options: CompressOptions) -> PlaneStorage | None:
    """How planes are encoded; None: whole records and their 8-bit form. UsageError for a method that has neither form."""
    if options.method == CODEC and not options.error_feedback:
        return None
    chosen = method(options.method)
    codec = chosen.codec() if isinstance(chosen, UniformBits) else None
    if not isinstance(codec, Nested) or not codec.symmetric or options.error_feedback:
        raise UsageError(f"'{options.method}' has no form in records", ADVICE)
    assert isinstance(chosen, UniformBits)
    asked = chosen.parameters
    codec.check(asked.bits or codec.widths[-1], asked.group or codec.groups[0])
    return PlaneStorage(codec.base, int(asked.bits or codec.widths[-1]), asked.group or codec.groups[0])


def write_records(
    folder: str | Path, out: str | Path, options: CompressOptions, report: Report, *, force: bool
) -> dict[str, Any]:
    """The packed file at `out`, complete or not at all; the folder's manifest. What `generate --expert-file` takes."""
    path, planes = Path(out), storage_of(options)
    check_apart(folder, path)
    if path.exists() and not (force and path.is_file()):
        raise UsageError(f"'{out}' exists already", "choose another --out, or give --force to replace a file")
    manifest = elastic_manifest(folder)
    with report("write") as update:
        write_pack(folder, path, manifest, low=planes is None, planes=planes, progress=update)
    return manifest
