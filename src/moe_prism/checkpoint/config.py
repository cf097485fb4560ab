"""config.json of a folder: read with care, and the empty model it describes, of the class that the folder was released with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import UsageError
from ..schema.config import check_config, cleaned
from ..schema.read import one_line
from .shards import read_json

ROW = 16
OWN_TYPES = "prism_"
"""How the model types of `architectures` begin."""
WRONG = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, StrictDataclassError,
)  # fmt: skip
"""What a library raises at values that it did not expect."""


def read_config(folder: Path, value: dict[str, Any] | None = None) -> Any:
    """config.json as a transformers config, within bounds, without the keys that could make a library fetch or run code.

    value: what it says, where that is not what the file says (`DequantizedSource.config`).
    """
    path = folder / "config.json"
    raw = read_json(path) if value is None else value
    check_config(raw, str(path))
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind.startswith(OWN_TYPES):
        from ..architectures import own  # noqa: F401 - which has transformers know them
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UsageError(f"{path}: model_type {str(kind)[:60]!r} is not one that transformers knows", "update transformers")
    try:
        config = CONFIG_MAPPING[kind]
        # the class's own reader of special floats ({"__float__": "Infinity"}), which from_pretrained applies and from_dict does not
        return config.from_dict(cleaned(config._decode_special_floats(raw)))
    except WRONG as error:
        raise UsageError(f"{path} is not a valid configuration: {_line(error)}", "restore it from its source") from error


def model_class(config: Any) -> Any:
    """The class to load a model of this config with: the one that config.json names for a model of several parts, else the causal one.

    A release that also sees or hears is saved by its own class (...ForConditionalGeneration); its tensors are only all accounted for
    in that class.
    """
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if not causal or config.get_text_config(decoder=True) is not config:
        named: Any = getattr(transformers, str(next(iter(config.architectures or ()), "")), None)
        if isinstance(named, type) and issubclass(named, GenerationMixin) and named.config_class is type(config):  # type: ignore[attr-defined]
            # Qwen3-Omni: a thinker that writes and a talker that speaks, run by `generate` only
            if getattr(named, "forward", None) is torch.nn.Module.forward:
                raise UsageError(f"{named.__name__} is several models in one", "save the part that writes text by its own class")
            return named
        if not causal and type(config) in AutoModelForImageTextToText._model_mapping:
            return AutoModelForImageTextToText
        if not causal and config.model_type.startswith(OWN_TYPES) and type(config) in AutoModel._model_mapping:
            return AutoModel  # of ours, it draws
    return AutoModelForCausalLM


def empty_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model that `config` describes on the meta device, in eval mode. UsageError where there is none."""
    kind = model_class(config)
    try:
        with torch.device("meta"):
            if issubclass(kind, PreTrainedModel):
                return run_aligned(kind._from_config(config, dtype=dtype).eval())
            return run_aligned(kind.from_config(config, dtype=dtype, trust_remote_code=False).eval())
    except WRONG as error:
        raise UsageError(f"'{folder}' is no causal language model: {_line(error)}", "check its config.json") from error


def run_aligned(model: Any) -> Any:
    """The model itself, its experts run one by one where torch's grouped product cannot: it wants rows of whole 16 bytes."""
    experts = (p for p in model.parameters() if p.ndim == 3)
    if any(size * p.element_size() % ROW for p in experts for size in p.shape[1:]) and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def _line(error: Exception) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
