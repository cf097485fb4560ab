"""Load a model and its tokenizer from a folder, a GGUF file or a hub name. `nano` and `nano-mix` are shipped in this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoint.config import model_class, read_config, run_aligned
from ..checkpoint.constant import constant_experts
from ..checkpoint.dequantized import quantization
from ..checkpoint.shards import read_json
from ..checkpoint.stream import LayerStream
from ..checkpoint.whole import open_whole
from ..errors import CorruptError, UsageError

_PACKAGE = Path(__file__).parent.parent
NANO = _PACKAGE / "nano"
SHIPPED = {"nano": NANO, "nano-mix": _PACKAGE / "nano_mix"}
_NAMES = " or ".join(f"'{name}'" for name in SHIPPED)


def resolve(source: str | Path) -> Path | str:
    """A local path (checked) or a hub name ("owner/model"). The names of `SHIPPED` -> the shipped models."""
    text = str(source)
    if text in SHIPPED:
        return SHIPPED[text]
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"'{text}' has no config.json", f"give a folder written by save_pretrained, or {_NAMES}")
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
        raise UsageError(f"model path '{text}' does not exist", f"give a folder with config.json, a .gguf file, or {_NAMES}")
    return text


def on_disk(where: Path | str) -> Path:
    """What `resolve` gave, if it is a path. UsageError for a hub name where the files themselves are read."""
    if isinstance(where, Path):
        return where
    raise UsageError(
        f"'{where}' is not on this machine", f"fetch it, `hf download {where} --local-dir FOLDER`, and give that folder"
    )


def load_model(source: str | Path, dtype: torch.dtype | None = None, config: Any = None) -> Any:
    """A transformers causal language model in eval mode. dtype None keeps the checkpoint's. Never runs remote code.

    A folder is checked to be whole before its weights are read: CorruptError names the tensor and file that is not. One of quantized
    weights is dequantized by us: what computes here is what `refactor` and `prune` read. One with constant experts, which transformers does
    not know, gets them from us too. A GGUF file says less than its model's
    config.json: `config` is taken, or what lies beside it.
    """
    from transformers import AutoModelForCausalLM

    where, kind, given = resolve(source), AutoModelForCausalLM, {}
    if isinstance(where, Path) and where.is_dir():
        if quantization(where) or constant_experts(read_json(where / "config.json")):
            return _streamed(where, dtype)
        open_whole(where)
        kind = model_class(read_config(where))
    elif isinstance(where, Path) and (config or (where.parent / "config.json").is_file()):
        given["config"] = config or read_config(where.parent)
    return run_aligned(_guard(kind, source, dtype=dtype or "auto", **given).eval())


def load_to_run(source: str | Path, dtype: torch.dtype | None = None) -> Any:
    """`load_model` where it will compute: on a GPU as stored, else in float32, the fast type of a CPU; or in `dtype`."""
    if torch.cuda.is_available():
        return load_model(source, dtype).cuda()
    return load_model(source, dtype or torch.float32)


def read_generation_config(model: Any, folder: Path) -> None:
    """What `from_pretrained` reads beside the weights, for a model that was loaded otherwise."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer beside a model. UsageError where there is none."""
    from transformers import AutoTokenizer

    return _guard(AutoTokenizer, source)


def _streamed(folder: Path, dtype: torch.dtype | None) -> Any:
    model = LayerStream(folder, dtype).keep_outside([])
    read_generation_config(model, folder)
    return model


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
