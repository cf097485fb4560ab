"""Every family as it is released: the class that its checkpoints are saved by, with towers and all, on disk.

The text part has the sizes of `families`; the other parts are as small as their own config allows.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_prism.artefact.load import load
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.elastic import operating_point
from moe_prism.jobs.inspect import inspect_model
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.refactor import refactor
from moe_prism.jobs.verify import verify
from moe_prism.model import load_model
from moe_prism.model.named import NANO
from moe_prism.options.prune import PruneOptions
from moe_prism.options.refactor import RefactorOptions
from moe_prism.point import FULL

from .checks import LIMIT, relative
from .families import GENERIC, OVERRIDES, model_class, randomise

VOCABULARY = {"vocab_size": 4096, "vocab_size_per_layer_input": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "depth": 2,
    "num_heads": 4,
    "head_dim": 8,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "image_size": 28,
    "patch_size": 14,
    "deepstack_visual_indexes": [0],
}
RELEASED: dict[str, str] = {"diffusion_gemma": "DiffusionGemmaForBlockDiffusion"}
PARTS: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe": {"": {"vision_start_token_id": 5}},
    "llama4": {"vision_config.": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}},
}
REFUSED: dict[str, tuple[str, str, str]] = {
    # family: (what works, the word of the first refusal, why)
    "deepseek_v4": (
        "refactor",
        "does not run alone",
        "a router that also reads token ids, or another input than the experts, is not pruned",
    ),
    "diffusion_gemma": ("nothing", "", "a diffusion model with a class of its own, and no causal one"),
    "ernie4_5_vl_moe": (
        "inspect",
        "cannot write the experts",
        "experts for text and for images share tensors, which transformers cannot write back in part",
    ),
    "gemma4": (
        "refactor",
        "does not run alone",
        "a router that also reads token ids, or another input than the experts, is not pruned",
    ),
    "inkling": ("refactor", "no router with a row per expert", "the router has no row per expert to take out"),
    "jetmoe": ("refactor", "not called with ids", "its experts are called with sorted rows, not with ids"),
    "llama4": ("refactor", "not called with ids", "its experts are called with weighted inputs, not with ids"),
    "longcat_flash": ("refactor", "hold no matrices", "the router also chooses among experts that hold no matrices"),
    "openai_privacy_filter": ("nothing", "no causal language model", "a classifier of tokens, not a language model"),
    "switch_transformers": ("refactor", "not called with ids", "its experts are modules of their own, not called with ids"),
    "zaya": ("refactor", "no router with a row per expert", "the router has no row per expert to take out"),
}
MOST = 8_000_000  # weights of a tiny model


def release_class(family: str) -> Any:
    """*ForConditionalGeneration where the family has one, else the class of the text model."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if family in RELEASED:
        return getattr(transformers, RELEASED[family])
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    found = [c for c in own if c.__name__.endswith("ForConditionalGeneration") and "PreTrained" not in c.__name__]
    return found[0] if found else model_class(family)


def _known(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)} | set(kind.attribute_map)
    return {key: value for key, value in sizes.items() if key in names}


def release_config(family: str, **text: int) -> Any:
    """text: other sizes of the text part."""
    kind = release_class(family).config_class
    sizes = _sizes(family, kind(), text=True)
    sizes.get("text_config", sizes).update(text)
    return kind(**sizes)


def _sizes(family: str, default: Any, text: bool, path: str = "") -> dict[str, Any]:
    """Small sizes for a config and the configs in it: of the text part those of `families`, else a tower's."""
    found = _known(type(default), {**GENERIC, **VOCABULARY, "max_position_embeddings": 128} if text else TOWER)
    inner = {name: getattr(default, name, None) for name in default.sub_configs or ()}
    for name, config in inner.items():
        if hasattr(config, "sub_configs"):
            below = "text" in name or "thinker" in name
            found[name] = {"model_type": config.model_type, **_sizes(family, config, below, f"{path}{name}.")}
    if text and not any(hasattr(config, "sub_configs") and "text" in name for name, config in inner.items()):
        found |= OVERRIDES.get(family, {})
    return found | PARTS.get(family, {}).get(path, {})


def save_release(family: str, folder: Path, **text: int) -> nn.Module:
    """Write the tiny model with prism-nano's tokenizer; returns it. text: other sizes of the text part."""
    torch.manual_seed(0)
    kind, config = release_class(family), release_config(family, **text)
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind._from_config(copy.deepcopy(config), dtype=torch.float32).parameters())
    assert weights < MOST, f"{weights} weights: some part of this family keeps its real size"
    model = kind._from_config(config, dtype=torch.float32).eval()
    randomise(model)
    model.save_pretrained(folder)
    for file in NANO.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return model


def text_output(model: nn.Module) -> Tensor:
    """Logits of one fixed batch of text."""
    ids = torch.randint(3, 4096, (2, 12), generator=torch.Generator().manual_seed(2))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    assert torch.isfinite(logits).all()
    return logits


def check_release(family: str, folder: Path, text: str) -> None:
    """Inspect, refactor, verify, generate, prune and reload the family as it is released. Raises at the first thing that does not hold."""
    source, out = folder / "source", folder / "elastic"
    save_release(family, source)
    assert not inspect_model(source)["unread_tensors"]
    check_refactor(family, source, out, text)
    check_prune(family, source, folder / "pruned")


def check_refactor(family: str, source: Path, out: Path, text: str) -> None:
    """The same function in the same files, only experts moved, and it generates with half of its slots."""
    calibration = CalibrateOptions(text=text, tokens=256, length=32, reservoir=64)
    refactor(source, out, RefactorOptions(n_sub=4, calibration=calibration, profile_tokens=0))
    verify(out)
    kind = release_class(family)
    before = text_output(kind.from_pretrained(source, dtype=torch.float32).eval())
    after = text_output(kind.from_pretrained(out, dtype=torch.float32).eval())
    assert relative(after, before) <= LIMIT, f"refactored: relative error {relative(after, before):.1e}"
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert moved and all("expert" in name or "mlp" in name or "feed_forward" in name or "moe" in name for name in moved)
    model, _ = load(out)
    with operating_point(model, point=FULL.with_slots(0.5)):  # of bytes, half is too little for one tiny expert per token
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, use_cache=False)
    assert tokens.shape[1] > 1


def check_prune(family: str, source: Path, out: Path) -> None:
    """Half of the experts, which both loaders take."""
    prune_model(source, out, PruneOptions(criterion="first-half", keep=0.5))
    verify(out)
    text_output(release_class(family).from_pretrained(out, dtype=torch.float32).eval())
    text_output(load_model(out))
    numbers = [[layer["experts"] for layer in inspect_model(place)["layers"]] for place in (source, out)]
    assert [2 * e for e in numbers[1]] == numbers[0]
