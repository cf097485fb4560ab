"""A Qwen2-MoE that starts from prism-nano: what it computes, and that its shared expert is part of it."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_prism.data import token_windows
from moe_prism.model import load_model, load_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def upcycle(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "common"))
    return importlib.import_module("upcycle")


@pytest.mark.slow
@torch.no_grad()
def test_a_start_is_close_to_nano_and_its_shared_expert_carries(upcycle):
    tokenizer = load_tokenizer("nano")
    seen, held = (token_windows(tokenizer, "stdlib", side, length=256, tokens=2048).ids for side in ("calibration", "evaluation"))
    shapes = json.loads((RECIPES / "nano-mix" / "config.json").read_text())["model"]
    new = Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=tokenizer.vocab_size, **shapes)).eval()
    upcycle.start_from(new, "nano", seen)

    def loss(model):
        logits = model(held, use_cache=False).logits
        return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), held[:, 1:].flatten()))

    nano, whole = loss(load_model("nano", torch.float32)), loss(new)
    assert nano < whole < nano + 0.7
    for layer in new.model.layers:
        layer.mlp.shared_expert.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
    assert loss(new) > whole + 0.1
