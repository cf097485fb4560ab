"""The router's probabilities, for routing stages that need more than the routing weights of the chosen experts.

Shapes: T tokens, d hidden, E experts, X extra experts of the model's own, R = E + X router rows, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .base import MoELayer

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}
CONFIG_NAMES = ("scoring_func", "score_func", "score_function")
ADVICE = "choose a routing stage that needs no router probabilities"
TOKENS = 0.9  # share of the tokens that must agree: in half precision some routing weights are rounded far from their probability


class RouterScores:
    """scores(x [T, d], index [T, k], weight [T, k]) -> [T, R] float32: what a layer's router thinks of every expert.

    The router's matrix is multiplied here once more. Whether softmax or sigmoid follows is found out at first use: the family's own
    routing weights must be proportional, token by token, to the probabilities of the experts that were chosen. Only a proved
    activation is remembered; a batch that proves nothing (k = 1) uses the one that the configuration names, else softmax.
    Raises UsageError for a layer without a router matrix, or whose routing weights follow from neither.
    """

    def __init__(self, model: nn.Module, layer: MoELayer) -> None:
        self.layer = layer
        self.activation: str | None = None
        self._matrix: tuple[Tensor, Tensor | None] | None = None
        if layer.is_dense:
            return
        if layer.weighs_input:
            raise UsageError(f"the experts of '{layer.name}' see inputs that their router did not see", ADVICE)
        found = _matrices(model, layer)
        if len(found) != 1:
            raise UsageError(f"no router matrix was found beside '{layer.name}'", ADVICE)
        self._matrix = found[0]
        configs = [getattr(owner, "config", None) for owner in (layer.module, model)]
        names = [getattr(config, name, None) for config in configs for name in CONFIG_NAMES]
        self._named: str = next((name for name in names if name), "softmax")

    @torch.no_grad()
    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if self._matrix is None:
            return torch.ones(len(x), 1, device=x.device)
        matrix, _ = self._matrix
        logits = self.logits(x)
        if self.activation is None:
            self.activation, chosen = self._prove(logits, index, weight, _tolerance(x, matrix, weight))
        else:
            chosen = self.activation
        return ACTIVATIONS[chosen](logits)

    def logits(self, x: Tensor) -> Tensor:
        """[T, R] float32: before the activation. Gradients flow to x [T, d]."""
        if self._matrix is None:
            return torch.zeros(len(x), 1, device=x.device)
        matrix, bias = self._matrix
        logits = nn.functional.linear(x.to(matrix.dtype), matrix, bias).float()
        return logits if self.layer.router_rows is None else logits[:, self.layer.router_rows.to(logits.device)]

    def _prove(self, logits: Tensor, index: Tensor, weight: Tensor, tolerance: float) -> tuple[str | None, str]:
        """(the activation that is proved, or None; the one to use)."""
        valid = (index >= 0) & (index < logits.shape[1]) & (weight != 0)
        telling = valid.sum(1) > 1
        passed = list(ACTIVATIONS)
        if telling.any():
            batch = logits[telling], index[telling], weight[telling], valid[telling]
            passed = [name for name, function in ACTIVATIONS.items() if _are_proportional(function, *batch, tolerance)]
        if len(passed) == 1:
            return passed[0], passed[0]
        if self._named not in passed:
            raise UsageError(
                f"the router's probabilities cannot be told at '{self.layer.name}': its weights follow from no softmax or sigmoid",
                ADVICE,
            )
        return None, self._named


def router_weight(model: nn.Module, layer: MoELayer) -> Tensor:
    """The router's rows [E, d] beside a layer's experts, without those of extra experts. UsageError where the family keeps it elsewhere."""
    found = _matrices(model, layer)
    if len(found) != 1:
        shape = [layer.num_experts, layer.hidden]
        raise UsageError(f"no router matrix {shape} found beside '{layer.name}'", "record without router inputs")
    rows = found[0][0].detach()
    return (rows if layer.router_rows is None else rows[layer.router_rows.to(rows.device)])[: layer.num_experts]


def _matrices(model: nn.Module, layer: MoELayer) -> list[tuple[Tensor, Tensor | None]]:
    """Every (matrix [R, d], bias [R] or None) in the block of a layer that could be its router's."""
    block = model.get_submodule(layer.block_name)
    rows = layer.num_experts + len(layer.extra or ()) if layer.router_rows is None else int(layer.router_rows.max()) + 1
    found: list[tuple[Tensor, Tensor | None]] = []
    for path, parameter in block.named_parameters():
        if tuple(parameter.shape) == (rows, layer.hidden) and "expert" not in path.split(".")[0]:
            owner: Any = block.get_submodule(path.rpartition(".")[0])
            bias = getattr(owner, "bias", None)
            found.append((parameter, bias if isinstance(bias, Tensor) and bias.shape == (rows,) else None))
    return found


def _are_proportional(
    function: Callable[[Tensor], Tensor], logits: Tensor, index: Tensor, weight: Tensor, valid: Tensor, tolerance: float
) -> bool:
    """Whether weight / probability is one number per token, over its valid choices. logits [T, R], the others [T, k]."""
    ratio = weight.float() / function(logits).gather(1, index.clamp(0, logits.shape[1] - 1).long())
    low, high = ratio.masked_fill(~valid, torch.inf).amin(1), ratio.masked_fill(~valid, -torch.inf).amax(1)
    return float((high - low <= tolerance * high.abs()).float().mean()) >= TOKENS


def _tolerance(*tensors: Tensor) -> float:
    return 1e-3 if all(t.dtype in (torch.float32, torch.float64) for t in tensors) else 5e-2
