"""Load an elastic model, and generate from it at any price."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checkpoint import elastic_manifest
from ..elastic import attach, operating_point
from ..elastic.rules import rules
from ..errors import CorruptError, UsageError
from ..model import find_layers, load_to_run, load_tokenizer
from ..routing import SkipPlan
from ..store import StoreOptions, load_stored

SIDE_FILE = "prism.safetensors"


def load(folder: str | Path, dtype: torch.dtype | None = None, *, store: StoreOptions | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder written by `refactor`: a transformers model that is elastic and runs at full budget.

    dtype None: float32 on a CPU, the checkpoint's own elsewhere. Change the price with `operating_point(model, budget=...)`.
    store: keep the experts on disk and this much of them in memory; the model then runs on the CPU in float32 (docs/store.md).
    Raises UsageError for a folder that is not a refactored model, CorruptError if prism.json was damaged.
    """
    manifest = elastic_manifest(folder)
    tensors = side_tensors(folder, len(manifest["layers"]))
    if store is not None:
        return load_stored(Path(folder), manifest, tensors, store), load_tokenizer(folder)
    model = load_to_run(folder, dtype)
    layers = find_layers(model)
    if model.device.type == "cpu":
        for layer in layers:
            layer.arrange()
    attach(model, manifest["n_sub"], gates=manifest["gates"], tensors=tensors, layers=layers)
    model._moe_prism.stored_bytes_per_weight = manifest["bytes_per_weight"]
    return model, load_tokenizer(folder)


def side_tensors(folder: str | Path, layers: int) -> list[dict[str, torch.Tensor]]:
    """Side tensors per layer from prism.safetensors, whose names are `layers.<i>.<tensor>`."""
    flat = read_tensors(Path(folder) / SIDE_FILE)
    prefix = "layers.{}."
    return [
        {k.removeprefix(prefix.format(i)): v for k, v in flat.items() if k.startswith(prefix.format(i))} for i in range(layers)
    ]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. CorruptError if it is missing or damaged."""
    try:
        return load_file(str(path))  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read: {error}", "restore the file, or build its folder again") from error


@dataclass(frozen=True)
class Generated:
    """One continuation. seconds: wall clock of the whole call on this machine."""

    prompt: str
    text: str
    budget: float
    rule: str | None
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def check_request(prompt: str, budget: float, rule: str | None, max_tokens: int, temperature: float, seed: int) -> None:
    """UsageError for what no model could be asked; a command looks at it before it loads one."""
    if not prompt:
        raise UsageError("the prompt is empty", "give some text with --prompt")
    if not 0 < budget <= 1:
        raise UsageError(f"budget {budget:g} is outside (0, 1]", "1 keeps every slot, 0.5 half of them")
    if rule is not None:
        rules.get(rule)
    if max_tokens < 1 or not 0 <= temperature < math.inf:
        raise UsageError(f"max_tokens {max_tokens} or temperature {temperature:g} is out of range", "use >= 1 and >= 0")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range", "give 0 or more, below 2**63")


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    budget: float = 1.0,
    rule: str | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    routing: SkipPlan | None = None,
) -> Generated:
    """Continue a prompt at one operating point (see `operating_point`, also for routing).

    Greedy at temperature 0, else sampled with the seed.

    Raises UsageError for an empty prompt, a bad number, or a prompt over the context limit.
    """
    check_request(prompt, budget, rule, max_tokens, temperature, seed)
    rows = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = rows["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length + max_tokens > limit:
        raise UsageError(
            f"{length} prompt tokens + {max_tokens} new ones pass the context limit of {limit}", "shorten one of them"
        )
    sampling: dict[str, Any] = {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {})}
    torch.manual_seed(seed)
    began = time.perf_counter()
    with torch.no_grad(), operating_point(model, budget, rule=rule, routing=routing):
        ids = model.generate(
            **rows, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **sampling
        )
    new = ids[0, length:]
    return Generated(prompt, tokenizer.decode(new, skip_special_tokens=True), budget, rule, len(new), time.perf_counter() - began)
