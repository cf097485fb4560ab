"""A folder as libraries get to see it: data alone. What could name code is taken out before any of them reads a byte."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CorruptError, UsageError
from ..schema import is_file_name, read_json
from ..schema.config import bounds_of, check_config, cleaned
from ..schema.read import RESTORE
from .links import inside
from .shards import INDEX, Source

CONFIG, TOKENIZER_JSON = "config.json", "tokenizer.json"
SETTINGS = (
    CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""JSON that is read here first, and written again for the library without what names code."""
PLAIN = (
    TOKENIZER_JSON, "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "bpe.codes", "normalizer.json", "entity_vocab.json",
    "tekken.json", "chat_template.jinja",
)  # fmt: skip
PLAIN_ENDINGS = (".model", ".spm", ".tiktoken")
TEMPLATES = "additional_chat_templates"
MOST_BYTES = 512 << 20  # of a file of a tokenizer
MOST_TEMPLATE = 1 << 20
MOST_TEMPLATES = 64


@contextmanager
def as_data(folder: Path, weights: bool = False, also: str | None = None) -> Iterator[Path]:
    """A temporary folder with the settings of `folder`, cleaned, and links to its vocabulary; weights: to its safetensors too.

    also: one more file, such as a .gguf. Nothing else of the folder is there: no code, no adapter that names another repository, no pickle.
    UsageError for a link that leads out, CorruptError for settings that are not JSON, or out of bounds.
    """
    view = Path(tempfile.mkdtemp(prefix="moe-prism-"))
    try:
        fill(folder, view, weights, also)
        yield view
    finally:
        shutil.rmtree(view, ignore_errors=True)


def fill(folder: Path, view: Path, weights: bool = False, also: str | None = None) -> None:
    """What `as_data` says, into a folder of the caller's."""
    for name in SETTINGS:
        if (folder / name).exists() or (folder / name).is_symlink():
            (view / name).write_text(json.dumps(settings(folder / name)), encoding="utf-8")
    names = [name for name in _names(folder) if name in PLAIN or name.endswith(PLAIN_ENDINGS)]
    if weights:
        source = Source(folder)
        names += [*source.shards(), *([INDEX] if source.index_file else [])]
    for name in (*names, *([also] if also else [])):
        _link(folder / name, view / name, None if also == name or name.endswith(".safetensors") else MOST_BYTES)
    if (folder / TEMPLATES).is_dir() and not (folder / TEMPLATES).is_symlink():
        (view / TEMPLATES).mkdir()
        for name in [name for name in _names(folder / TEMPLATES) if name.endswith(".jinja")][:MOST_TEMPLATES]:
            _link(folder / TEMPLATES / name, view / TEMPLATES / name, MOST_TEMPLATE)


def settings(path: Path) -> dict[str, object]:
    """A JSON object of a folder, within bounds and without what names code. CorruptError where it is none."""
    value = read_json(inside(path), RESTORE, bounds_of(path.name))
    if not isinstance(value, dict):
        raise CorruptError(f"{path} is not a JSON object", RESTORE)
    if path.name == CONFIG:
        check_config(value, str(path))
    return cleaned(value)  # type: ignore[no-any-return]


def _names(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in folder.iterdir() if is_file_name(entry.name) and (entry.is_file() or entry.is_symlink())
    )


def _link(path: Path, place: Path, most: int | None) -> None:
    if not inside(path).is_file():
        raise UsageError(f"'{path}' is no plain file", "replace it by a file, or remove it")
    if most is not None and path.stat().st_size > most:
        raise CorruptError(f"{path} has {path.stat().st_size} bytes, at most {most} are read", RESTORE)
    place.symlink_to(path.resolve())
