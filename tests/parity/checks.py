"""What parity means: the same output after a permutation of neurons, and with every expert computed as four sub-experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.runtime import experts_per_token
from moe_prism.errors import UsageError
from moe_prism.model import ExpertLayout, MoELayer, RouterScores, find_layers
from moe_prism.model.parallel import ParallelLayer
from moe_prism.model.plain import FlatLayer, PlainCall
from moe_prism.model.scaled_input import ScaledInputLayer
from moe_prism.model.separate import SeparateLayer
from tests.elastic.common import computed

BLOCKS = 4
LIMIT = 1e-5  # relative error, float32
MATTERS = 0.02  # least relative change when the experts are silenced: below it parity would prove little
TOKENS, VOCAB = 12, 96


@dataclass
class Result:
    """Everything measured on one model."""

    layers: int
    layout: str
    permuted: float  # relative error after a random permutation of the neurons of every layer
    split: float  # largest relative error over the executors, every expert computed as BLOCKS sub-experts
    detached: float  # relative error after the hook is taken off again
    matters: float  # relative change when the experts are silenced
    scores: str  # what `RouterScores` finds: softmax, sigmoid, (softmax) where nothing proves it, or none
    spread: int  # fewest experts in use at a layer, beyond the k that one token uses
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("permuted", "split", "detached"):
            if not getattr(self, name) <= LIMIT:
                self.problems.append(f"{name}: relative error {getattr(self, name):.1e}")
        if not self.matters >= MATTERS:
            self.problems.append(f"the experts change the output by {self.matters:.1e} only")
        if self.spread < 1 and self.layout != "dense":
            self.problems.append("every token uses the same experts")


def output(model: nn.Module) -> Tensor:
    """Logits, or the last hidden state of a model without a head, for one fixed batch."""
    ids = torch.randint(3, VOCAB, (2, TOKENS // 2), generator=torch.Generator().manual_seed(2))
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result = model(input_ids=ids, use_cache=False, **more)
    out: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    assert torch.isfinite(out).all(), "the output is not finite"
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def permute_all(layers: list[MoELayer]) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        layer.permute(torch.stack([torch.randperm(layer.width, generator=generator) for _ in range(layer.num_experts)]))


def split_outputs(model: nn.Module, layers: list[MoELayer]) -> list[Tensor]:
    """The output at full budget by each way to compute, with the shortcut for full budget switched off."""
    elastic = attach(model, BLOCKS, layers=layers)
    elastic.always_split = True
    outputs = []
    for way in ("reference", "grouped", "auto"):
        if way == "auto":
            for layer in layers:
                layer.arrange()  # as `moe_prism.load` does: the compiled executor runs then
        with operating_point(model, 1.0, rule="whole-experts"), computed(elastic, way):
            outputs.append(output(model))
    elastic.detach()
    return outputs


def routing(model: nn.Module, layers: list[MoELayer]) -> tuple[dict[str, Tensor], str]:
    """Expert ids [T, k] chosen at every layer that the batch reaches, and what the routers' probabilities are."""
    seen: dict[str, Tensor] = {}
    scores: set[str] = set()

    def recorder(layer: MoELayer):
        def experts(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            assert x.ndim == 2 and index.shape == weight.shape == (len(x), index.shape[1])
            seen[layer.name] = index
            scores.add(verdict(model, layer, x, index, weight))
            return layer.stock(x, index, weight)

        return experts

    for layer in layers:
        layer.install(recorder(layer))
    output(model)
    for layer in layers:
        layer.uninstall()
    return seen, ", ".join(sorted(scores))


def verdict(model: nn.Module, layer: MoELayer, x: Tensor, index: Tensor, weight: Tensor) -> str:
    try:
        scores = RouterScores(model, layer)
        found = scores(x, index, weight)
    except UsageError:
        return "none"
    assert found.shape == (len(x), layer.num_experts + len(layer.extra or ())) and torch.isfinite(found).all()
    return scores.activation or "(softmax)"


@torch.no_grad()
def silenced(model: nn.Module, layers: list[MoELayer]) -> Tensor:
    """The output when the experts add nothing. The model is of no use after it."""
    for layer in layers:
        layer.down.zero_()
        if layer.down_bias is not None:
            layer.down_bias.zero_()
    return output(model)


def measure(model: nn.Module, *, dense: bool | None = False) -> Result:
    layers = find_layers(model, dense=dense)
    before = output(model)
    seen, scores = routing(model, layers)
    k = experts_per_token(model, layers[0])
    assert {ids.shape[1] for ids in seen.values()} == {k}, f"the config says {k} experts per token"
    permute_all(layers)
    permuted = output(model)
    split = split_outputs(model, layers)
    detached = output(model)
    return Result(
        layers=len(layers),
        layout=describe(layers[0]),
        permuted=relative(permuted, before),
        split=max(relative(out, before) for out in split),
        detached=relative(detached, permuted),
        scores=scores,
        spread=min(len(ids.unique()) for ids in seen.values()) - k,
        matters=relative(silenced(model, layers), before),
    )


FORMS: dict[type[MoELayer], str] = {
    FlatLayer: "rows of 2-D tensors, no interface",
    ParallelLayer: "two modules called with sorted rows",
    SeparateLayer: "a module per expert, no gate",
}


def describe(layer: MoELayer) -> str:
    layout: ExpertLayout | None = getattr(layer, "layout", None)
    if layout is None:
        return FORMS.get(type(layer), "dense")
    words = ["concatenated" if layout.is_concatenated else "interleaved"] if layout.has_gate else ["no gate"]
    words += ["transposed"] * layout.is_transposed + ["bias"] * layout.has_bias + ["no interface"] * isinstance(layer, PlainCall)
    words += ["routing weight on the input"] * isinstance(layer, ScaledInputLayer)
    words += [f"{len(layer.extra)} more that copy their input"] if layer.extra else []
    return ", ".join(words)
