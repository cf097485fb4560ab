"""What the name of a model stands for: a folder, a GGUF file or a hub name. `nano` and `nano-mix` are shipped in this package."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from .hub import fetched, is_hub_name

_PACKAGE = Path(__file__).parent.parent
NANO = _PACKAGE / "nano"
SHIPPED = {"nano": NANO, "nano-mix": _PACKAGE / "nano_mix"}
_NAMES = " or ".join(f"'{name}'" for name in SHIPPED)


def resolve(source: str | Path, *, weights: bool = True) -> Path:
    """A local path, checked. The names of `SHIPPED` stand for the shipped models, OWNER/MODEL for a snapshot in the hub's cache.

    weights: whether a snapshot must hold them, or what describes the model is enough.
    """
    text = str(source)
    if text in SHIPPED:
        return SHIPPED[text]
    if is_hub_name(text):
        found = fetched(text, weights=weights)
        if found.is_dir() and not (found / "config.json").is_file():
            raise UsageError(f"'{text}' has no config.json on its hub", "of GGUF files name one: OWNER/MODEL/FILE.gguf")
        return found
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"'{text}' has no config.json", f"give a folder written by save_pretrained, or {_NAMES}")
        from ..checkpoint.shards import read_json  # most wrong names are known without it

        read_json(path / "config.json")
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UsageError(f"'{text}' is a file, not a model folder", "give the folder that holds config.json, or a .gguf file")
    raise UsageError(
        f"model path '{text}' does not exist", f"give a folder with config.json, a .gguf file, OWNER/MODEL, or {_NAMES}"
    )
