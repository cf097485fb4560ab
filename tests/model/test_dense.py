"""Dense MLPs as layers of one expert: the same parity as the MoE families."""

from __future__ import annotations

import importlib

import pytest
import torch

from moe_prism.errors import UsageError
from moe_prism.model import find_layers

from ..parity.checks import Result, measure
from ..parity.families import GENERIC, randomise

FAMILIES = {
    # family: (model class, has a gate, has biases)
    "llama": ("LlamaForCausalLM", True, False),
    "qwen2": ("Qwen2ForCausalLM", True, False),
    "qwen3": ("Qwen3ForCausalLM", True, False),
    "mistral": ("MistralForCausalLM", True, False),
    "gemma": ("GemmaForCausalLM", True, False),
    "gemma2": ("Gemma2ForCausalLM", True, False),
    "smollm3": ("SmolLM3ForCausalLM", True, False),
    "phi3": ("Phi3ForCausalLM", True, False),  # gate and up in one Linear
    "glm4": ("Glm4ForCausalLM", True, False),
    "phi": ("PhiForCausalLM", False, True),
    "gpt_neox": ("GPTNeoXForCausalLM", False, True),
    "starcoder2": ("Starcoder2ForCausalLM", False, True),
    "falcon": ("FalconForCausalLM", False, False),
    "nemotron": ("NemotronForCausalLM", False, False),
}


def build(family: str, **overrides: object) -> torch.nn.Module:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cls = getattr(module, FAMILIES[family][0])
    known = set(cls.config_class().to_dict()) | set(cls.config_class.attribute_map)
    config = cls.config_class(**{k: v for k, v in GENERIC.items() if k in known} | overrides)
    torch.manual_seed(0)
    model = cls(config).float().eval()
    randomise(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str) -> None:
    result: Result = measure(build(family), dense=None)
    assert result.layers == GENERIC["num_hidden_layers"]
    assert not result.problems, result


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family: str) -> None:
    _, gated, biased = FAMILIES[family]
    for layer in find_layers(build(family)):
        assert layer.num_experts == 1
        assert layer.up.shape == (1, layer.width, layer.hidden)
        assert layer.down.shape == (1, layer.hidden, layer.width)
        assert (layer.gate is not None) == gated
        assert (layer.up_bias is not None) == (layer.down_bias is not None) == biased


def test_phi3_halves_alias_the_one_linear() -> None:
    layer = find_layers(build("phi3"))[0]
    weight = layer.module.gate_up_proj.weight
    with torch.no_grad():
        layer.gate.fill_(1.0)
        layer.up.fill_(2.0)
    assert (weight[: layer.width] == 1).all() and (weight[layer.width :] == 2).all()


def test_dense_can_be_refused() -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has no MoE layer"):
        find_layers(build("llama"), dense=False)


def test_detached_layer_runs_its_own_forward() -> None:
    layer = find_layers(build("llama"))[0]
    x = torch.randn(3, layer.hidden)
    before = layer.module(x)
    layer.install(lambda x, index, weight: torch.zeros_like(x))
    assert not layer.module(x).any()
    layer.uninstall()
    assert torch.equal(layer.module(x), before)
