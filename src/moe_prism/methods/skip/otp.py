"""OTP (online top-any pruning, MC#, arXiv 2510.10962): a small network per layer says how many of its experts a token computes.

It sees the layer's input x and the k routing weights, largest first, and scores the k masks "the first j": W2 relu(W1 [x ; w]) + b. The
highest score wins. In training a mask is drawn instead (Gumbel-softmax, straight through, at a temperature that falls from 2 to 0.3),
all layers at once. The loss is KL to the full model plus a price on the share that is kept, everything but the networks is frozen. The
paper sets the price by hand; here it follows the share until the mean is met, and one number per layer, added to b for every expert
more, then sets it exactly on the calibration text. Shapes: T tokens, d hidden, k experts per token, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...point import RoutingStage
from ...routing.base import Routed, SkipStage, VariantIndex, ranks
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, calibration_facts, given
from .profile import own_rule, views

H, BATCH, RATE, CLIP = 32, 2, 3e-3, 1.0
HOT, COLD = 2.0, 0.3  # temperatures
STEPS, PACE = 120, 0.05  # of training; how fast the price follows
TENSORS = ("w1", "w2", "b")


class Net(NamedTuple):
    """w1 [H, d + k], w2 [k, H], b [k] of one layer."""

    w1: Tensor
    w2: Tensor
    b: Tensor

    def scores(self, x: Tensor, ranked: Tensor) -> Tensor:
        """[T, k]: of the masks that keep 1, 2, ... k experts. x [T, d], ranked [T, k] routing weights, largest first."""
        both = torch.cat([x.float(), ranked.clamp(min=0).float()], 1)
        return torch.relu(both @ self.w1.T) @ self.w2.T + self.b

    @classmethod
    def of(cls, numbers: Sequence[Sequence[float]], width: int, k: int) -> Net:
        """From the numbers of a stage; width: d + k. UsageError where they are of another model."""
        w1, w2, b = (torch.tensor(list(row), dtype=torch.float32) for row in numbers)
        if len(w1) != H * width or len(w2) != H * k or len(b) != k:
            raise UsageError("the networks of stage 'otp' are of another model", "make the point for this model")
        return cls(w1.view(H, width), w2.view(k, H), b)


class OtpStage(SkipStage):
    """As many of a token's experts as its layer's network says, at most the layer's n; without numbers all of them."""

    paper = "arXiv 2510.10962"

    def __init__(self, variants: Sequence[RoutingStage]) -> None:
        super().__init__(variants)
        for variant in variants:
            if variant.parameters and set(variant.parameters) != set(TENSORS):
                raise UsageError("stage 'otp' lacks its networks", "make it with `moe-prism skip --method otp`")
        self._nets: dict[tuple[int, int, torch.device], Net] = {}

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        return not self.variants[variant].parameters and self.counts.of_variant(variant, layer)[0] >= k

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        """By the layer's n alone: what the network says needs the layer's input."""
        return (ranks(ranked) < self.counts.at(layer, which, ranked.device)).expand(ranked.shape)

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        index, weight = routed.index, routed.weight
        chosen = index >= 0
        ranked, order = self.rank_by(routed).masked_fill(~chosen, -1.0).sort(dim=1, descending=True, stable=True)
        mine = [self._count(routed, ranked, variant) for variant in range(len(self.variants))]
        table = torch.stack(mine)
        count = table[which] if isinstance(which, int) else table.gather(0, which.reshape(1, -1).to(table.device))[0]
        keep = (ranks(ranked) < count[:, None]) & self.kept(ranked, routed.layer, which)
        keep = torch.zeros_like(chosen).scatter_(1, order, keep) & chosen
        left = self._weights(weight, weight.float().abs().masked_fill(~chosen, 0.0), keep)
        return replace(routed, index=index.masked_fill(~keep, -1), weight=left)

    def _count(self, routed: Routed, ranked: Tensor, variant: int) -> Tensor:
        """[T]: experts that a variant keeps."""
        if not self.variants[variant].parameters:
            return torch.full((len(ranked),), ranked.shape[1], device=ranked.device)
        net = self._net(variant, routed.layer, routed.x.shape[1] + ranked.shape[1], ranked)
        return net.scores(routed.x, ranked).argmax(1) + 1

    def _net(self, variant: int, layer: int, width: int, like: Tensor) -> Net:
        key = (variant, layer, like.device)
        if key not in self._nets:
            numbers = [self.variants[variant].parameters[name][layer] for name in TENSORS]
            self._nets[key] = Net(*(tensor.to(like.device) for tensor in Net.of(numbers, width, like.shape[1])))
        return self._nets[key]


@dataclass(frozen=True, kw_only=True)
class OtpParameters:
    """steps: of training, of two windows each; price: of the kept share in nats, fixed; below 0: it follows the mean that is asked for."""

    steps: int = STEPS
    price: float = -1.0


class Otp(SkipMethod):
    """`otp:STEPS`: a small network per layer, trained to keep as many of a token's experts as it needs."""

    needs = ("calibration text",)
    paper = "arXiv 2510.10962"
    stage: ClassVar[type[OtpStage]] = OtpStage
    Parameters = OtpParameters
    parameters: OtpParameters

    @classmethod
    def example(cls) -> str:
        return "2"

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        if self.parameters.steps < 1:
            raise UsageError(f"'{self.name}' trains for no step", "give 1 or more, or leave it out for 120")
        if self.is_priced and mean is not None:
            raise UsageError(f"the price of '{self.name}' says how many experts stay", "leave the mean out, or the price")
        mean = subject.k if self.is_priced else given(self.name, mean)
        nets, price = train(subject, mean, self.parameters)
        inputs = views(subject, "input", lambda routed: routed.x)
        weights = views(subject, "weights", lambda routed: routed.weight.float().abs())
        scores = [net.scores(x, w.sort(dim=1, descending=True).values) for net, x, w in zip(nets, inputs, weights, strict=True)]
        shift = 0.0 if self.is_priced else settled(scores, mean)
        nets = [net._replace(b=net.b + shift * torch.arange(subject.k)) for net in nets]
        kept = [float((own + shift * torch.arange(subject.k)).argmax(1).double().mean()) + 1 for own in scores]
        parameters = {
            name: tuple(tuple(float(f"{v:.6g}") for v in getattr(net, name).flatten().tolist()) for net in nets)
            for name in TENSORS
        }
        stage = RoutingStage(layers=all_experts(subject), stage="otp", parameters=parameters)
        facts = {"price": price, "shift": shift, "layer_means": [round(m, 4) for m in kept], "steps": self.parameters.steps}
        return Fitted(stage, sum(kept) / len(kept), {**facts, **calibration_facts(subject)})

    @property
    def is_priced(self) -> bool:
        """Whether the price is fixed."""
        return self.parameters.price >= 0

    def means(self, subject: Subject) -> Sequence[float | None]:
        if self.is_priced:
            return [None]
        return [mean for mean in super().means(subject) if mean is not None and mean > 1]


def settled(scores: Sequence[Tensor], mean: float) -> float:
    """What is added per expert more so that the mean over tokens and layers is met; by halving. scores [S, k] per layer."""
    steps = torch.arange(scores[0].shape[1])
    low, high = -1e3, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        found = sum(float((own + middle * steps).argmax(1).double().mean()) + 1 for own in scores) / len(scores)
        low, high = (middle, high) if found < mean else (low, middle)
    return high


class _Masked:
    """One layer under training: draws a mask for every token. temperature None: the layer whole."""

    def __init__(self, subject: Subject, number: int, generator: torch.Generator, scales: bool) -> None:
        self.layer, self.scales, self.generator = subject.elastic.layers[number].parts.layer, scales, generator
        width, k = self.layer.hidden + subject.k, subject.k
        first = torch.randn(H, width, generator=generator) / width**0.5
        self.w1, self.w2 = nn.Parameter(first), nn.Parameter(torch.zeros(k, H))
        self.b = nn.Parameter(torch.linspace(-1, 1, k))  # most tokens begin with all their experts
        self.temperature: float | None = None
        self.share = torch.zeros(())

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if self.temperature is None:
            return self.layer.stock(x, index, weight)
        size = weight.detach().float().abs().masked_fill(index < 0, 0.0)
        ranked, order = size.sort(dim=1, descending=True, stable=True)
        scores = Net(self.w1, self.w2, self.b).scores(x.detach(), ranked)
        noise = -(-torch.rand(scores.shape, generator=self.generator).clamp(1e-9, 1 - 1e-7).log()).log()
        soft = ((scores + noise) / self.temperature).softmax(1)
        hard = nn.functional.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype)
        drawn = hard + soft - soft.detach()
        mask = drawn.flip(1).cumsum(1).flip(1)  # rank j is kept where at least j + 1 are
        self.share = scores.softmax(1).flip(1).cumsum(1).flip(1).mean()
        mask = torch.zeros_like(mask).scatter(1, order, mask)
        kept = weight * mask
        if self.scales:
            kept = kept * (size.sum(1, keepdim=True) / (size * mask).sum(1, keepdim=True).clamp(min=1e-9))
        return self.layer.stock(x, index, kept.to(weight.dtype))


def train(subject: Subject, mean: float, parameters: OtpParameters) -> tuple[list[Net], float]:
    """The networks of all layers, and the last price."""
    generator = torch.Generator().manual_seed(0)
    scales = own_rule(subject)
    layers = [_Masked(subject, i, generator, scales) for i in range(subject.layers)]
    needed = [p for p in subject.model.parameters() if p.requires_grad]
    subject.model.requires_grad_(False)
    try:
        for layer in layers:
            layer.layer.install(layer)
        with torch.enable_grad():
            price = _steps(subject, layers, mean, parameters, generator)
    finally:
        for elastic in subject.elastic.layers:
            elastic.parts.layer.install(elastic)
        for p in needed:
            p.requires_grad_(True)
    return [Net(layer.w1.detach(), layer.w2.detach(), layer.b.detach()) for layer in layers], price


def _steps(
    subject: Subject, layers: Sequence[_Masked], mean: float, parameters: OtpParameters, generator: torch.Generator
) -> float:
    weights = [p for layer in layers for p in (layer.w1, layer.w2, layer.b)]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    price, wanted, steps = max(0.0, parameters.price), mean / subject.k, parameters.steps
    order = torch.zeros(0, dtype=torch.long)
    with subject.report("train masks") as update:
        for step in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(subject.calibration), generator=generator)
            rows, order = subject.calibration[order[:BATCH]].to(subject.model.device), order[BATCH:]
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (steps - step) / steps)
            with torch.no_grad():
                source = _log_probabilities(subject, layers, rows, None)
            found = _log_probabilities(subject, layers, rows, HOT + (COLD - HOT) * step / max(1, steps - 1))
            share = torch.stack([layer.share for layer in layers]).mean()
            loss = (source.exp() * (source - found)).sum(-1).mean() + price * share
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            if parameters.price < 0:
                price = max(0.0, price + PACE * (float(share.detach()) - wanted))
            update(step + 1, steps)
    return price


def _log_probabilities(subject: Subject, layers: Sequence[_Masked], rows: Tensor, temperature: float | None) -> Tensor:
    for layer in layers:
        layer.temperature = temperature
    logits: Tensor = subject.model(input_ids=rows, use_cache=False).logits
    return logits.float().flatten(0, 1).log_softmax(-1)
