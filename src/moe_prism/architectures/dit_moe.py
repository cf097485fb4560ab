"""DiT-MoE (arXiv 2407.11633): a transformer that draws, with shared and routed experts, trained by rectified flow on handwritten digits.

A picture is cut into patches. Every layer is modulated by the time and the class (adaLN, arXiv 2212.09748). Between noise x_0 and a picture
x_1 lies x_t = (1 - t) x_0 + t x_1, and the model says the velocity x_1 - x_0. The weights of chosen experts are their probabilities, not
made to add up to one. Shapes: B pictures of S x S pixels, P patches of p x p pixels, T = B P, d hidden, E experts, k per patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from hashlib import sha256
from typing import Annotated, Any

import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeMLP, OlmoePreTrainedModel, OlmoeTopKRouter

from ..errors import UsageError
from ..schema.common import Form, Share
from .base import Architecture, Examples, Picturing, Predicted, StepPlace, TokenIds, TrainingPart, olmoe_keys
from .olmoe import OwnBlock

PURPOSE = 5
SIDE, SHADES, CLASSES = 8, 16, 10
HELD = 5  # one picture of so many is held out
FREQUENCIES = 32


@strict
class DiTMoEConfig(OlmoeConfig):
    """OLMoE's. vocab_size counts the classes, and one for a picture of no class."""

    model_type = "prism_dit_moe"

    image_size: int = SIDE
    patch_size: int = 2
    shared_experts: int = 2


class DiTMoEBlock(OwnBlock):
    """Routed experts beside shared ones, which are one wide MLP."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__(config, OlmoeTopKRouter(config))
        wide = copy(config)
        wide.intermediate_size = config.shared_experts * config.intermediate_size
        self.shared_expert = OlmoeMLP(wide) if config.shared_experts else None

    def beside(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        return None if self.shared_expert is None else self.shared_expert(x)


class DiTLayer(nn.Module):
    """Attention among all patches, then the experts, each scaled, shifted and gated by what modulates the layer."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(d, config.rms_norm_eps, elementwise_affine=False) for _ in range(2))
        self.qkv, self.o_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.modulation = nn.Linear(d, 6 * d)
        self.mlp = DiTMoEBlock(config)

    def forward(self, x: Tensor, about: Tensor) -> Tensor:
        """x [B, P, d]; about [B, d]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(nn.functional.silu(about))[:, None].chunk(6, -1)
        joined = self.qkv(self.attention_norm(x) * (1 + scale) + shift).view(*x.shape[:2], 3, self.heads, -1)
        q, k, v = joined.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.o_proj(attended)
        out: Tensor = x + gate_mlp * self.mlp(self.mlp_norm(x) * (1 + scale_mlp) + shift_mlp)
        return out


class DiTMoEModel(OlmoePreTrainedModel):
    """The velocity of pictures between noise and what they are to be."""

    config_class = DiTMoEConfig
    main_input_name = "pixels"

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__(config)
        d, pixels = config.hidden_size, config.patch_size**2
        self.embed_patches = nn.Linear(pixels, d)
        self.embed_places = nn.Parameter(torch.zeros((config.image_size // config.patch_size) ** 2, d))
        self.embed_classes = nn.Embedding(config.vocab_size, d)
        self.time_in = nn.Sequential(nn.Linear(2 * FREQUENCIES, d), nn.SiLU(), nn.Linear(d, d))
        self.layers = nn.ModuleList([DiTLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(d, config.rms_norm_eps, elementwise_affine=False)
        self.lm_head = nn.Linear(d, pixels)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Eager alone, as our other classes."""
        return False

    def forward(self, pixels: Tensor, time: Tensor, classes: Tensor) -> Tensor:
        """pixels [B, S S] between -1 and 1, with noise; time [B] in 0..1, 0 is noise; classes [B] -> velocity [B, S S]."""
        size = self.config.patch_size
        count = self.config.image_size // size
        patches = pixels.view(-1, count, size, count, size).transpose(2, 3).flatten(3).flatten(1, 2)
        x = self.embed_patches(patches) + self.embed_places
        about = self.time_in(waves(time)) + self.embed_classes(classes)
        for layer in self.layers:
            x = layer(x, about)
        said = self.lm_head(self.norm(x))
        found: Tensor = said.view(-1, count, count, size, size).transpose(2, 3).flatten(1)
        return found


def waves(time: Tensor) -> Tensor:
    """Sines and cosines [B, 2 F] of time [B], from one turn to hundreds."""
    rates = torch.logspace(0, 2.5, FREQUENCIES, device=time.device)
    turns = time[:, None] * rates
    return torch.cat([turns.sin(), turns.cos()], -1)


@torch.no_grad()
def draw_pictures(model: Any, classes: Sequence[int], *, steps: int = 50, guidance: float = 1.0, seed: int = 0) -> Tensor:
    """Pictures [B, S, S] between -1 and 1 of classes [B] (10: of none), by Euler steps from noise.

    guidance: how far the velocity goes beyond that of no class; 1: no further.
    """
    wanted, size = torch.tensor(list(classes)), model.config.image_size
    x = torch.randn(len(wanted), size * size, generator=torch.Generator().manual_seed(seed))
    none = torch.full_like(wanted, model.config.vocab_size - 1)
    for step in range(steps):
        time = torch.full((len(wanted),), step / steps)
        velocity = model(pixels=x, time=time, classes=wanted)
        if guidance != 1:
            plain = model(pixels=x, time=time, classes=none)
            velocity = plain + guidance * (velocity - plain)
        x = x + velocity / steps
    return x.clamp(-1, 1).view(-1, size, size)


class RectifiedFlow(Picturing):
    """Squared error of the velocity, per pixel. An example [S S + 1] is a picture and its class."""

    unit = "squared error of the velocity, per pixel"
    what = "pictures of handwritten digits (scikit-learn)"

    def __init__(self, patch: int, unlabelled: float) -> None:
        self.positions, self.unlabelled = (SIDE // patch) ** 2, unlabelled

    def examples(self) -> Examples:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UsageError("the digits are scikit-learn's, which is missing", "pip install 'moe-prism[pictures]'") from error
        digits = load_digits()
        pixels = torch.from_numpy(digits.data).float() / (SHADES / 2) - 1
        rows = torch.cat([pixels, torch.from_numpy(digits.target).float()[:, None]], 1)
        held = torch.arange(len(rows)) % HELD == 0
        return Examples(rows[~held].contiguous(), rows[held].contiguous(), (sha256(rows[~held].numpy().tobytes()).hexdigest(),))

    def predict(self, run: Callable[..., Any], batch: Tensor, place: StepPlace) -> Predicted:
        generator = place.generator(PURPOSE)
        noise, time = torch.randn(batch[:, :-1].shape, generator=generator), torch.rand(len(batch), generator=generator)
        classes = batch[:, -1].long().masked_fill(torch.rand(len(batch), generator=generator) < self.unlabelled, CLASSES)
        mixed = between(noise, batch[:, :-1], time)

        def again() -> Tensor:
            velocity: Tensor = run(pixels=mixed, time=time, classes=classes)
            return velocity

        said = again()
        return Predicted((said.float() - (batch[:, :-1] - noise)).square().mean(), mixed, said, again)

    def judge(self, run: Callable[..., Any], held: Tensor) -> float:
        noise, time, classes = held_inputs(held)
        said = run(pixels=between(noise, held[:, :-1], time), time=time, classes=classes)
        return float((said.float() - (held[:, :-1] - noise)).square().mean())


def between(noise: Tensor, pictures: Tensor, time: Tensor) -> Tensor:
    """(1 - t) noise + t pictures, all [B, n], time [B]."""
    return (1 - time[:, None]) * noise + time[:, None] * pictures


def held_inputs(held: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(noise [B, n], times [B] spread evenly over the examples, classes [B]) of held-out examples [B, n + 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(held[:, :-1].shape, generator=generator)
    time = (torch.randperm(len(held), generator=generator) + 0.5) / len(held)
    return noise, time, held[:, -1].long()


class StillStart(TrainingPart):
    """Layers begin as nothing but their input (adaLN-Zero): their gates, and what is said, are 0."""

    def start(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, DiTLayer):
                nn.init.zeros_(module.modulation.weight)
                nn.init.zeros_(module.modulation.bias)
            elif isinstance(module, DiTMoEModel):
                nn.init.zeros_(module.lm_head.weight)
                nn.init.zeros_(module.lm_head.bias)


class DiTMoESettings(Form):
    """shared: experts that always run. patch: pixels of a side. unlabelled: share of the pictures that are shown without a class."""

    shared: Annotated[int, Field(ge=0, le=1024)] = 2
    patch: Annotated[int, Field(ge=1, le=SIDE)] = 2
    unlabelled: Share = 0.1


class DiTMoE(Architecture):
    """Learns from pictures: a recipe says nothing of text. `model.context` is not used."""

    Settings = DiTMoESettings

    def task(self) -> Picturing:
        return RectifiedFlow(self.settings.patch, self.settings.unlabelled)

    def config(self, vocabulary: TokenIds) -> Any:
        s = self.settings
        if SIDE % s.patch:
            raise UsageError(
                f"settings.patch {s.patch} is no divisor of {SIDE}", f"give one that divides a side of {SIDE} pixels"
            )
        keys = olmoe_keys(self.shape, TokenIds(CLASSES + 1, CLASSES, CLASSES, CLASSES))
        return DiTMoEConfig(**keys, norm_topk_prob=False, image_size=SIDE, patch_size=s.patch, shared_experts=s.shared)

    def build(self, config: Any) -> Any:
        return DiTMoEModel(config)

    def parts(self) -> list[TrainingPart]:
        return [StillStart()]

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape.model_copy(update={"context": 512}), {"shared": 1, "patch": 4}


AutoConfig.register(DiTMoEConfig.model_type, DiTMoEConfig, exist_ok=True)
AutoModel.register(DiTMoEConfig, DiTMoEModel, exist_ok=True)
