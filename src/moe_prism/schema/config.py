"""Files of other tools: what of them is looked at, within which bounds, and what of them no library gets to see."""

from __future__ import annotations

import math
from typing import Annotated, Any

from annotated_types import MaxLen, MinLen
from pydantic import ConfigDict, Field, StringConstraints, model_validator

from .common import Form
from .read import RESTORE, JsonBounds, check

CONFIG_BOUNDS = JsonBounds(bytes=8 << 20, depth=16, values=1_000_000, keys=100_000, infinite=True)
"""Of `config.json`: a library copies and compares its keys one by one, so their number is bounded before it sees them."""
SETTINGS_BOUNDS = JsonBounds(bytes=64 << 20, depth=16, values=4_000_000, keys=1_000_000, infinite=True)
"""Of a tokenizer's files, which may hold a vocabulary."""
MOST_KEYS = 2000  # of a configuration or a part of it: a library makes an attribute of each
INDEX_BOUNDS = JsonBounds(bytes=256 << 20, depth=4, values=8_000_000, keys=2_000_000)
BANNED = (
    "auto_map", "attn_implementation", "experts_implementation", "kernel_config", "use_kernels", "kernels", "custom_generate",
    "custom_pipelines", "trust_remote_code", "adapter_kwargs", "code_revision", "name_or_path", "tokenizer_file", "vocab_file",
    "merges_file", "spm_file",
)  # fmt: skip
"""Keys that name code, an implementation that a library would fetch, or a file elsewhere."""
SPECIAL = ("__float__", "__type")
"""Keys with an underscore that say what a value is: a special float, an added token."""
USUAL = ("bfloat16", "float16", "float32")
MOST_COUNT = 1 << 53


class IndexForm(Form):
    """`model.safetensors.index.json`: which shard holds a tensor."""

    model_config = ConfigDict(extra="ignore")

    weight_map: Annotated[dict[str, str], MinLen(1)]


def cleaned(value: Any) -> Any:
    """JSON without code references, private fields and names of implementations (a hub kernel can be named there), at any depth."""
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {
        k: v for k, v in value.items() if k in SPECIAL or not (k in BANNED or k.startswith("_") or k.endswith("_implementation"))
    }
    return {k: cleaned(v) for k, v in kept.items()}


Layers = Annotated[int, Field(ge=0, le=4096)]
Size = Annotated[int, Field(ge=0, le=1 << 24)]
Several = Annotated[int, Field(ge=0, le=1 << 20)]
Each = Several | Annotated[list[Several], MaxLen(4096)]
Small = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class ConfigForm(Form):
    """What a configuration may say, at its top or in a part, as far as families share names. Everything else is theirs to check."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    model_type: Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_.-]*$")] | None = None
    architectures: Annotated[list[Annotated[str, MaxLen(256)]], MaxLen(16)] | None = None
    num_hidden_layers: Layers | None = None
    hidden_size: Size | None = None
    vocab_size: Size | None = None
    num_attention_heads: Each | None = None
    max_position_embeddings: Annotated[float, Field(ge=-1, le=1 << 40)] | None = None
    num_experts: Each | None = None
    num_local_experts: Each | None = None
    n_routed_experts: Each | None = None
    moe_num_experts: Each | None = None
    num_experts_per_tok: Each | None = None
    rms_norm_eps: Small | None = None
    layer_norm_eps: Small | None = None
    layer_norm_epsilon: Small | None = None
    norm_eps: Small | None = None
    dtype: str | dict[str, str] | None = None
    torch_dtype: str | dict[str, str] | None = None

    @model_validator(mode="after")
    def fits(self) -> ConfigForm:
        """A type that there is, no more chosen experts than there are, and numbers that fit a register."""
        types = [t for given in (self.dtype, self.torch_dtype) for t in (given.values() if isinstance(given, dict) else [given])]
        for name in types:
            if name is not None and name != "auto" and not _is_type(name.removeprefix("torch.")):
                raise ValueError(f"says dtype {name[:40]!r}, which is no type of numbers")
        if len(self.model_extra or {}) > MOST_KEYS:
            raise ValueError(f"has more than {MOST_KEYS} keys")
        experts = [n for n in (self.num_experts, self.num_local_experts, self.n_routed_experts) if isinstance(n, int)]
        chosen = self.num_experts_per_tok
        if isinstance(chosen, int) and experts and chosen > max(1, *experts):
            raise ValueError(f"chooses {chosen} experts per token of {max(experts)}")
        for name, value in (self.model_extra or {}).items():
            wide = isinstance(value, int) and abs(value) > MOST_COUNT
            if wide or (isinstance(value, float) and math.isnan(value)):
                raise ValueError(f"says {name[:60]!r} is a number that nothing can be")
        return self


def _is_type(name: str) -> bool:
    """Whether torch has a type of numbers of this name; of the usual ones it need not be asked."""
    if name in USUAL:
        return True
    import torch

    return isinstance(vars(torch).get(name), torch.dtype)


def parts(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration and the parts it is made of: those that are one by their name, or have a model type of their own."""
    inner = [
        item
        for key, item in value.items()
        if isinstance(item, dict) and ("model_type" in item or (key.endswith("_config") and "quant" not in key))
    ]
    return [value, *(part for one in inner for part in parts(one))]


def bounds_of(name: str) -> JsonBounds:
    """What a JSON file of a model's folder may be."""
    return CONFIG_BOUNDS if name == "config.json" else SETTINGS_BOUNDS


def check_config(value: dict[str, Any], where: str) -> None:
    """CorruptError for a configuration that says what no model has."""
    for part in parts(value):
        check(ConfigForm, part, where, RESTORE)
