"""The models that the package brings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.errors import UsageError
from moe_prism.model import find_layers, load_model, load_tokenizer
from moe_prism.model.named import SHIPPED, resolve


@pytest.fixture(scope="module")
def mix():
    return load_model("nano-mix", torch.float32)


def test_models_are_known_by_name():
    assert set(SHIPPED) == {"nano", "nano-mix"} and all((resolve(name) / "model.safetensors").is_file() for name in SHIPPED)
    with pytest.raises(UsageError, match="does not exist") as raised:
        resolve("./nano-mis")
    assert "'nano' or 'nano-mix'" in raised.value.next_step


def test_nano_mix_has_what_nano_lacks(mix):
    config = mix.config
    assert config.model_type == "qwen2_moe" and config.norm_topk_prob and config.shared_expert_intermediate_size > 0
    assert (resolve("nano-mix") / "model.safetensors").stat().st_size <= 40e6
    sums = []
    for layer in find_layers(mix):
        layer.install(lambda x, index, weight, layer=layer: (sums.append(weight.sum(-1)), layer.stock(x, index, weight))[1])
    mix(torch.arange(64)[None])
    for layer in find_layers(mix):
        layer.uninstall()
    assert len(sums) == 6 and torch.allclose(torch.cat(sums), torch.ones(6 * 64), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_experts_of_nano_mix_are_specialised_on_every_domain(mix, domain):
    ids = token_windows(load_tokenizer("nano-mix"), f"domains/{domain}", "evaluation", length=128, tokens=1024).ids

    def loss():
        logits = mix(ids).logits
        return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    whole = loss()
    assert whole < 4.5  # an even guess is 8.3
    layers = find_layers(mix)
    for layer in layers:
        layer.install(lambda x, index, weight, layer=layer: layer.stock(x, (index + 1) % layer.num_experts, weight))
    others = loss()
    for layer in layers:
        layer.uninstall()
    assert others > whole + 0.5
    assert loss() == pytest.approx(whole)
