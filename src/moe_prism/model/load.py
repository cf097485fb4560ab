"""Load a model and its tokenizer from a folder, a GGUF file or a hub name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoint.config import WRONG, model_class, read_config, run_aligned
from ..checkpoint.constant import constant_experts
from ..checkpoint.dequantized import quantization
from ..checkpoint.shards import read_json
from ..checkpoint.stream import LayerStream
from ..checkpoint.view import as_data, settings
from ..checkpoint.whole import look
from ..errors import CorruptError, PrismError, UsageError
from ..schema.read import one_line
from .named import resolve
from .place import compute_type, placement

DRAWING = ("prism_dit_moe",)
"""Model types without text."""


def load_model(source: str | Path, dtype: torch.dtype | None = None, config: Any = None, *, device_map: str | None = None) -> Any:
    """A transformers causal language model in eval mode. dtype None keeps the checkpoint's. Never runs remote code.

    A folder is checked to be whole before its weights are read: CorruptError names the tensor and file that is not. One of quantized
    weights is dequantized by us: what computes here is what `refactor` and `prune` read. One with constant experts, which transformers does
    not know, gets them from us too. A GGUF file says less than its model's
    config.json: `config` is taken, or what lies beside it. device_map: as `from_pretrained` has it, for accelerate.
    """
    from transformers import AutoModelForCausalLM

    where = resolve(source)
    if where.is_dir():
        if quantization(where) or constant_experts(read_json(where / "config.json")):
            if device_map:
                raise UsageError(f"'{where}' is dequantized as it is read, which --device-map cannot spread", "give --device")
            return _streamed(where, dtype)
        look(where)
        known = read_config(where)
        kind, given = (
            model_class(known),
            {"config": known, "generation_config": _generation_config(where), "use_safetensors": True},
        )
    else:
        known = config or (read_config(where.parent) if (where.parent / "config.json").is_file() else None)
        kind, given = AutoModelForCausalLM, {} if known is None else {"config": known}
    given |= {"device_map": device_map}
    model = _guard(kind, where, weights=True, dtype=dtype or "auto", **{k: v for k, v in given.items() if v is not None})
    return run_aligned(model.eval())


def load_to_run(source: str | Path, dtype: torch.dtype | None = None) -> Any:
    """`load_model` where it will compute: on a GPU as stored, else in float32, the fast type of a CPU; or in `dtype`.

    Inside `placed` where and in which type that says.
    """
    place, asked = placement(), dtype or compute_type()
    if place.device_map:
        return spread(source, asked, place.device_map)
    gpu = torch.cuda.is_available() if place.device is None else torch.device(place.device).type != "cpu"
    wanted = asked if isinstance(asked, torch.dtype) else None if gpu or asked == "auto" else torch.float32
    model = load_model(source, wanted)
    if not gpu:
        return model
    return model.cuda() if place.device is None else model.to(place.device)


def spread(source: str | Path, asked: torch.dtype | str | None, device_map: str) -> Any:
    """Over the devices that accelerate finds. UsageError without it, or where something would be left outside of them.

    Its hooks bring offloaded weights in when a module is called; experts are computed from the weights themselves.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise UsageError("--device-map needs accelerate", "pip install 'moe-prism[accelerate]', or give --device") from error
    wanted = asked if isinstance(asked, torch.dtype) else None if torch.cuda.is_available() or asked == "auto" else torch.float32
    model = load_model(source, wanted, device_map=device_map)
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise UsageError(
            f"--device-map {device_map} leaves parts of the model on the {min(places & {'cpu', 'disk'})}",
            "keep experts on disk with --expert-memory, or layers with --low-memory",
        )
    return model


def read_generation_config(model: Any, folder: Path) -> None:
    """What `from_pretrained` reads beside the weights, for a model that was loaded otherwise."""
    found = _generation_config(folder)
    if found is not None:
        model.generation_config = found


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer beside a model. UsageError where there is none."""
    from transformers import AutoTokenizer

    where = resolve(source)
    check_writes(where)
    return _guard(AutoTokenizer, where)


def check_writes(where: Path) -> None:
    """UsageError for a folder whose model draws pictures."""
    if (where / "config.json").is_file() and read_json(where / "config.json").get("model_type") in DRAWING:
        raise UsageError(
            f"the model in '{where}' draws pictures, and says no next token",
            "inspect takes it; moe_prism.architectures.dit_moe.draw_pictures draws",
        )


def _generation_config(folder: Path) -> Any:
    """generation_config.json, None where there is none."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_dict(settings(path))
    except WRONG as error:
        raise UsageError(f"{path} is not a valid configuration: {_first(error)}", "restore it from its source") from error


def _streamed(folder: Path, dtype: torch.dtype | None) -> Any:
    model = LayerStream(folder, dtype).keep_outside([])
    read_generation_config(model, folder)
    return model


def _guard(auto: Any, where: Path, weights: bool = False, **kwargs: Any) -> Any:
    """`from_pretrained` of a folder or a .gguf file, of which the library sees data alone."""
    folder, file = (where, None) if where.is_dir() else (where.parent, where.name)
    if file:
        kwargs["gguf_file"] = file
    try:
        with as_data(folder, weights and not file, file) as view, without_bars():
            found = auto.from_pretrained(str(view), trust_remote_code=False, **kwargs)
    except PrismError:
        raise
    except SafetensorError as error:
        raise CorruptError(f"the weights of '{where}' cannot be read: {error}", "restore the files from their source") from error
    except Exception as error:
        first = _first(error)
        if "backend tokenizer" in first:  # a list of reasons follows that is about other formats
            first = "there is no tokenizer.json that transformers can read"
        raise UsageError(f"cannot load '{where}': {first}", "check the folder") from error
    if hasattr(found, "config"):
        found.config._name_or_path = str(where)
    found.name_or_path = str(where)
    return found


@contextmanager
def without_bars() -> Iterator[None]:
    """A library prints nothing: the progress bars of transformers are off inside."""
    from transformers.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


def _first(error: Exception) -> str:
    return one_line(next(iter(str(error).strip().splitlines()), type(error).__name__), 200)
