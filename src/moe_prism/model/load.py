"""Load a model and its tokenizer from a folder, a GGUF file or a hub name. `nano` is the model shipped in this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CorruptError, UsageError

NANO = Path(__file__).parent.parent / "nano"


def resolve(source: str | Path) -> Path | str:
    """A local path (checked) or a hub name ("owner/model"). `nano` -> the shipped prism-nano."""
    text = str(source)
    if text == "nano":
        return NANO
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"'{text}' has no config.json", "give a folder written by save_pretrained, or 'nano'")
        try:
            json.loads((path / "config.json").read_text())
        except ValueError as error:
            raise CorruptError(f"{path / 'config.json'} is not JSON: {error}", "restore the file from its source") from error
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise UsageError(f"'{text}' is a file, not a model folder", "give the folder that holds config.json, or a .gguf file")
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UsageError(f"model path '{text}' does not exist", "give a folder with config.json, a .gguf file, or 'nano'")
    return text


def on_disk(where: Path | str) -> Path:
    """What `resolve` gave, if it is a path. UsageError for a hub name where the files themselves are read."""
    if isinstance(where, Path):
        return where
    raise UsageError(
        f"'{where}' is not on this machine", f"fetch it, `hf download {where} --local-dir FOLDER`, and give that folder"
    )


def load_model(source: str | Path, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """A transformers causal language model in eval mode. dtype None keeps the checkpoint's. Never runs remote code.

    A GGUF file says less than its model's config.json: one that lies beside it is taken.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = resolve(source)
    if isinstance(where, Path) and where.suffix == ".gguf" and (where.parent / "config.json").is_file():
        kwargs.setdefault("config", AutoConfig.from_pretrained(str(where.parent), trust_remote_code=False))
    return _guard(AutoModelForCausalLM, source, dtype=dtype or "auto", **kwargs).eval()


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer beside a model. UsageError where there is none."""
    from transformers import AutoTokenizer

    return _guard(AutoTokenizer, source)


def _guard(auto: Any, source: str | Path, **kwargs: Any) -> Any:
    where = resolve(source)
    if isinstance(where, Path) and where.suffix == ".gguf":
        kwargs["gguf_file"], where = where.name, where.parent
    try:
        return auto.from_pretrained(str(where), trust_remote_code=False, **kwargs)
    except SafetensorError as error:
        raise CorruptError(f"the weights of '{source}' cannot be read: {error}", "restore the files from their source") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "backend tokenizer" in first:  # a list of reasons follows that is about other formats
            first = "there is no tokenizer.json that transformers can read"
        here = isinstance(where, Path)
        raise UsageError(
            f"cannot load '{source}': {first}", "check the folder" if here else "check the name and the connection"
        ) from error
