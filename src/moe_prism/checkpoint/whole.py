"""A source is whole, or it is refused before anything starts: every tensor its architecture wants is there, in its shape, and readable.

Nothing here knows a family. The model is built on the meta device, transformers' own conversion says where each tensor on disk would
go, and the same rules backwards say what the files of such a model hold. Only headers are read, and the values of small tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CorruptError
from .config import WRONG, empty_model, read_config
from .constant import CompactSource, substitute
from .convert import Conversion
from .dequantized import open_source
from .dtypes import TORCH
from .links import follows_links
from .shards import INDEX, SINGLE, Source
from .tensors import check_finite

SMALL = 1 << 16  # bytes; norms, biases and the routers of small models: their values are looked at
SMALL_IN_ALL = 1 << 26
SCALED = ("F8", "F4", "F6")  # dtypes whose numbers mean nothing without the scales of a quantization


def open_whole(folder: str | Path, dtype: torch.dtype | None = None, written: str | None = None) -> Conversion:
    """The empty model of a folder with the rules that bring its tensors in. dtype None: that of config.json.

    A quantized checkpoint is held against its architecture as what it stands for. written: see `open_source`.

    UsageError for a model that cannot be taken, CorruptError in one line naming tensor and file for a folder that is not whole.
    """
    seen, source = _seen(Path(folder)), open_source(folder, written)
    config = read_config(source.folder, source.config())
    dtype = dtype or config.dtype or _first_float(source)
    model = empty_model(source.folder, config, dtype)
    if isinstance(source, CompactSource):
        substitute(model, source.constants)
    conversion = Conversion(model, source, dtype)
    check_whole(conversion)
    if seen is not None:
        _passed.add(seen)
    return conversion


def look(folder: str | Path) -> None:
    """The errors of `open_whole`, for whoever wants nothing else of it. What passed in this process and is as it was is not read again."""
    if _seen(Path(folder)) not in _passed:
        open_whole(folder)


Seen = tuple[str, bool, tuple[tuple[str | int, ...], ...]]
_passed: set[Seen] = set()


def _seen(folder: Path) -> Seen | None:
    """What tells a folder from one that was changed since: its files, their sizes, and when each was last written to, or replaced."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        stats = [(path.name, path.stat()) for path in files]
        facts = tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats)
        return str(folder.resolve()), follows_links(), facts
    except OSError:
        return None


def check_whole(conversion: Conversion) -> None:
    """CorruptError naming the first tensor that is missing, misshapen, of another kind of number, or not finite though small."""
    source, problems = conversion.source, _problems(conversion)
    if problems:
        (name, what), more = problems[0], f" ({len(problems) - 1} more tensors are wrong)" if len(problems) > 1 else ""
        raise CorruptError(f"{_file(source, name)}: tensor '{name}' {what}{more}", _next_step(source))
    left = SMALL_IN_ALL
    for name in source.names():
        info = source.info(name)
        if info.bytes <= min(SMALL, left) and info.dtype in TORCH:
            left -= info.bytes
            check_finite(name, source.tensor(name), info.shard)


def _problems(conversion: Conversion) -> list[tuple[str, str]]:
    """(tensor, what is wrong with it) of each that is not as it should be."""
    source, owner = conversion.source, conversion.owner
    verdict = conversion.try_load()
    missing = _left_to_chance(conversion.model, verdict.missing)
    wanted = _disk_shapes(conversion, verdict.missing - missing)
    patterns, known = {_pattern(name) for name in wanted}, {_pattern(name) for name in owner}
    found = list(_strange_numbers(conversion))
    for name, shape in wanted.items():
        if name in owner and source.info(name).shape != shape:
            found.append((name, f"is {list(source.info(name).shape)}, config.json says {list(shape)}"))
        # A family may be stored under other names than it is saved with: only a name like those in the files can be missed.
        elif name not in owner and _pattern(name) in known:
            found.append((name, "is missing"))
    strange = [name for name in owner if name not in wanted and _pattern(name) in patterns]
    found += [(name, "is in no model of this config.json") for name in strange]
    told = {name for name in wanted if _pattern(name) in known}
    found += [(name, "is missing") for name in sorted(missing - told)]
    return found or list(verdict.wrong.items())


def _strange_numbers(conversion: Conversion) -> Iterator[tuple[str, str]]:
    """Weights stored as whole numbers or truth values, and the other way round."""
    expected = conversion.model.state_dict()
    for name, target in conversion.owner.items():
        dtype = conversion.source.info(name).dtype
        if dtype.startswith(SCALED):
            yield name, f"is {dtype}, and config.json has no quantization_config that scales it"
        elif TORCH[dtype].is_floating_point != expected[target].is_floating_point():
            yield name, f"is {dtype}, the model wants {str(expected[target].dtype).removeprefix('torch.')}"


def _left_to_chance(model: Any, unfed: set[str]) -> set[str]:
    """Of the parameters that nothing feeds, those neither tied to one that is fed nor known to be absent from releases."""
    missing, ties = set(unfed), getattr(model, "all_tied_weights_keys", {})
    for _ in ties:  # a chain of ties settles in as many rounds at most
        settled = {t for t, s in ties.items() if s not in missing} | {s for t, s in ties.items() if t not in missing}
        if not missing & settled:
            break
        missing -= settled
    absent = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return {name for name in missing if not any(pattern.search(name) for pattern in absent)}


def _disk_shapes(conversion: Conversion, without: set[str]) -> dict[str, tuple[int, ...]]:
    """What the files of such a model hold, by name; {} where the rules cannot be turned round."""
    state = {name: tensor for name, tensor in conversion.model.state_dict().items() if name not in without}
    try:
        return {name: tuple(tensor.shape) for name, tensor in conversion.disk_form(state, conversion.owner).items()}
    except WRONG:
        return {}


def _file(source: Source, name: str) -> str:
    """The file of a tensor; of one that is missing, the file that holds those named most like it."""
    names = dict.fromkeys(source.names())
    nearest = name if name in names else max(names, key=lambda other: _alike(name, other), default=None)
    return source.info(nearest).shard if nearest else SINGLE


def _alike(one: str, other: str) -> int:
    """Letters that two names begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _next_step(source: Source) -> str:
    if not source.index_file and (source.folder / INDEX).is_file():
        return f"{SINGLE} is read before {INDEX}, as transformers does: remove the one that is stale"
    return "see that config.json belongs to these weights, or download both again"


def _first_float(source: Source) -> torch.dtype:
    dtypes = [source.info(name).torch_dtype for name in source.names()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
