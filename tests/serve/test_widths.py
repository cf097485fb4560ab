"""Latent attention in the paged cache: keys wider than values or narrower, and a `head_dim` that is neither."""

from __future__ import annotations

from itertools import product

import httpx2
import pytest

import moe_prism
from moe_prism.artefact.open import open_model
from moe_prism.serve.engine import engine
from moe_prism.serve.engine.widths import room
from tests.serve.house import open_house
from tests.tiers import by_night
from tests.tiny_sources import save_tiny

PROMPTS = ("import os", "class Foo:\n    def __init__(self, a, b):\n" * 6)
PARTS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@pytest.mark.parametrize(
    ("widths", "ours"),
    by_night(product(((8, 8, 8), (4, 4, 8), (4, 4, 12)), (True, False)), ((4, 4, 12), False)),
)
def test_a_server_gives_the_tokens_of_generate(widths, ours, tmp_path, monkeypatch):
    save_tiny("deepseek_v2", tmp_path / "model", **dict(zip(PARTS, widths, strict=True)))
    if not ours:
        monkeypatch.setattr(engine, "full_attention", lambda model: False)
    opened = open_model(tmp_path / "model")
    sampling = moe_prism.GenerateOptions(max_tokens=6)
    own = [moe_prism.generate(opened.model, opened.tokenizer, prompt, sampling=sampling).text for prompt in PROMPTS]
    with open_house(tmp_path / "model") as house, httpx2.Client(base_url=house.root, timeout=60) as web:
        body = {"max_tokens": 6, "temperature": 0, "model": f"{house.built.service.name}@full"}
        found = [web.post("/v1/completions", json={**body, "prompt": prompt}).json() for prompt in PROMPTS]
    assert [each["choices"][0]["text"] for each in found] == own


def test_a_model_has_its_own_width_again_after_the_cache_is_made(tmp_path):
    model = save_tiny("deepseek_v2", tmp_path / "model", **dict(zip(PARTS, (8, 4, 6), strict=True)))
    with room(model):
        assert model.config.head_dim in (12, 8)
    assert model.config.head_dim == 4
