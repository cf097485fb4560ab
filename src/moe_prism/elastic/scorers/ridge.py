"""The default scorer: a ridge regression per expert from the layer input and its gate neurons to the log of the block output norms.

For expert e and features z = [x, sqrt(|a_g| ||W_down[:, g]||) for its N*r gate neurons, 1], the block output norms are predicted as
exp(B_e z), B_e fitted in closed form on the calibration sample. No training, one small matmul. The log matters where slots are
dropped: norms fitted directly come out negative for weak blocks, tie at zero, and the wrong ones go
(docs/developer/log.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..base import FEW, LayerParts, Scorer, are_few, gate_activations, gate_activations_all, gate_activations_each, of_choices
from .ridge_fit import ridge_fit

if TYPE_CHECKING:
    from ...kernels.selection import Norms
    from ..execute.batch_products import MatrixPart, Stored

FLOOR = 1e-3  # of the mean block norm, added before the log: a block that is off is not infinitely far from one that is faint
CEILING = 30.0  # of a predicted log norm: no overflow on inputs far from the sample


def block_norms(parts: LayerParts, x: Tensor, expert: int) -> Tensor:
    """True output norms [S, N] of one expert's blocks for rows x [S, d], before the routing weight."""
    layer = parts.layer
    blocks = [parts.neurons(n) for n in range(parts.n_sub)]
    return torch.stack([layer.project(expert, layer.activations(expert, x, b), b).float().norm(dim=-1) for b in blocks], 1)


def features(parts: LayerParts, x: Tensor, expert: int, scale: Tensor) -> Tensor:
    """z [S, d + N r + 1]. scale [N, r]: down-projection column norms of the gate neurons."""
    gates = gate_activations(parts, x, expert) if parts.gates else None
    return _join(x, gates, scale)


def _join(x: Tensor, gates: Tensor | None, scale: Tensor) -> Tensor:
    """[x, sqrt(gates * scale), 1] of rows x [S, d] and gate activations [S, N, r]."""
    parts = [x.float()] if gates is None else [x.float(), (gates * scale).sqrt().flatten(1)]
    return torch.cat([*parts, torch.ones(len(x), 1, device=x.device)], 1)


def gate_scale(parts: LayerParts) -> Tensor:
    """||W_down[:, g]|| of every gate neuron, [E, N, r]."""
    norms: Tensor = parts.layer.down[:, :, parts.gate_ids().flatten()].float().norm(dim=1)
    return norms.view(parts.layer.num_experts, parts.n_sub, parts.gates)


class RidgeFit(NamedTuple):
    """weight: B [E, N, d + N r + 1] (bfloat16). held: predictions [S', N] for every expert's `held_out` rows, by a fit without them."""

    weight: Tensor
    held: list[Tensor]


def fit(parts: LayerParts, samples: Sequence[Tensor], losses: Callable[[Tensor, int], Tensor] | None = None) -> RidgeFit:
    """From the sampled inputs [S_e, d] of each expert.

    losses(x, expert) -> [S, N]: what is predicted instead of the norms of the blocks' outputs.
    """
    scale = gate_scale(parts)
    width = parts.layer.hidden + parts.n_sub * parts.gates + 1
    result = torch.zeros(parts.layer.num_experts, parts.n_sub, width, dtype=torch.bfloat16)
    held: list[Tensor] = []
    for expert, x in enumerate(samples):
        held.append(torch.zeros(0, parts.n_sub))
        if len(x):
            x = x.to(parts.layer.up.device, parts.layer.up.dtype)
            z = features(parts, x, expert, scale[expert]).double()
            y = (losses(x, expert) if losses else block_norms(parts, x, expert)).double()
            found, others = ridge_fit(z, (y + FLOOR * y.mean() + 1e-30).log())
            result[expert] = found.T.to("cpu", torch.bfloat16)
            held[-1] = others.clamp(max=CEILING).exp().float().cpu()
    return RidgeFit(result, held)


@cache
def _compiled() -> tuple[ModuleType, ModuleType, ModuleType]:
    """What compiles when it is imported, and is asked for at every layer: an import statement there costs more than a product."""
    from ...kernels import row_products, selection
    from ..execute import decode_products

    return row_products, selection, decode_products


class Ridge(Scorer):
    """Reads `ridge` [E, N, d + N r + 1] of the parts."""

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.weight = parts.tensors["ridge"].to(parts.layer.up.device).float()
        self.scale = gate_scale(parts)
        self._constants: tuple[Stored, Any, Any, Any] | None = None  # of `_direct`

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        stored = self._stored(x)
        if stored is not None:
            return self._direct(x, index, stored) if are_few(x, index) else self._tiled(x, index, stored)
        if index.numel() <= FEW:
            return self._few(x.repeat_interleave(index.shape[1], 0), index.reshape(-1)).view(*index.shape, -1)
        return self._all(x, index)

    def _tiled(self, x: Tensor, index: Tensor, stored: Stored) -> Tensor:
        """By the compiled jobs: predictor rows and gate neurons are columns of one product, grouped by expert."""
        from ...kernels.selection import Norms, predicted_norms
        from ..execute.batch_products import Columns, SlotGroups, activated, dot

        n, r, layer, parts = self.parts.n_sub, self.parts.gates, self.parts.layer, self._parts(stored)
        groups = SlotGroups.of(index, torch.ones(*index.shape, 1, dtype=torch.bool), layer.num_experts)
        products = torch.empty(index.numel(), n + len(stored.first) * n * r)
        for alike in _by_type(parts):
            dot(x if x.stride(1) == 1 else x.contiguous(), groups, groups.all, Columns(alike, 0, n), products, groups.choice)
        gates = activated(layer, products[:, n:].contiguous()) if r else products[:, n:]
        norms = torch.empty(*index.shape, n)
        scale, weight = self.scale.flatten(1).numpy(), self.weight.numpy()
        known = Norms(products.numpy(), gates.numpy(), scale, weight, CEILING)
        predicted_norms(known, index.numpy(), norms.numpy())
        return norms

    def _direct(self, x: Tensor, index: Tensor, stored: Stored) -> Tensor:
        """`_tiled` for few choices, to the last bit: one by one, in one call."""
        from ...kernels.selection import predicted_norms

        norms = np.empty((*index.shape, self.parts.n_sub), np.float32)
        predicted_norms(self._terms(x, index, stored), index.contiguous().numpy(), norms)
        return torch.from_numpy(norms)

    def terms(self, x: Tensor, index: Tensor) -> Norms | None:
        """What `selection.predicted_norms` wants to know of few choices; None for many, or where the weights are not laid out for it."""
        stored = self._stored(x) if are_few(x, index) else None
        return None if stored is None else self._terms(x, index, stored)

    def _stored(self, x: Tensor) -> Stored | None:
        """The layer's weights, where the compiled products can take them."""
        from ..execute.batch_products import usable  # compiles on first use

        return usable(self.parts, x) if self.parts.layer.up_bias is None else None

    def _terms(self, x: Tensor, index: Tensor, stored: Stored) -> Norms:
        row_products, selection, decode = _compiled()
        if self._constants is None or self._constants[0] is not stored:
            tables = [
                (decode.table_of(alike), decode.like_of(alike[0].matrix.tensor.dtype)) for alike in _by_type(self._parts(stored))
            ]
            self._constants = stored, tables, self.scale.flatten(1).numpy(), self.weight.numpy()
        _, tables, scale, weight = self._constants
        n, r = self.parts.n_sub, self.parts.gates
        x, choice = x if x.stride(1) == 1 else x.contiguous(), index.contiguous().numpy()
        products = np.empty((choice.size, n + len(stored.first) * n * r), np.float32)
        asked = x.detach().numpy(), decode.rows_of(*choice.shape), choice.reshape(-1)
        for table, like in tables:
            row_products.dots(*asked, len(weight) - 1, table, n, decode.ORDER, products, like)
        gates = products[:, n:]
        if r:
            gates = decode.activated(self.parts.layer, torch.from_numpy(gates).contiguous()).numpy()
        found: Norms = selection.Norms(products, gates, scale, weight, CEILING)
        return found

    def gate_parts(self, stored: Stored) -> list[MatrixPart]:
        """Gate neurons as columns of a product of their own."""
        return [part._replace(column=part.column - self.parts.n_sub) for part in self._parts(stored)[1:]]

    def _parts(self, stored: Stored) -> list[MatrixPart]:
        """Predictor rows, then gate neurons, as columns of one product."""
        from ..execute.batch_products import Matrix, MatrixPart

        n, r = self.parts.n_sub, self.parts.gates
        parts = [MatrixPart(Matrix.of(self.weight), 0)]
        for i, (matrix, *_) in enumerate(stored.first):
            parts += [MatrixPart(matrix, n + i * n * r + g, g, r, self.parts.block) for g in range(r)]
        return parts

    def _few(self, x: Tensor, experts: Tensor) -> Tensor:
        """Rows x [S, d] with one expert [S] each -> [S, N], by gathered weights: at decode a loop over experts would cost more."""
        gates = gate_activations_each(self.parts, x, experts) if self.parts.gates else None
        z = _join(x, gates, self.scale[experts])
        return torch.einsum("sd,snd->sn", z, self.weight[experts]).clamp(max=CEILING).exp()

    def _all(self, x: Tensor, index: Tensor) -> Tensor:
        """[T, k, N] by few operations: what every expert reads off x in one product, then the gate neurons' part of the chosen ones."""
        hidden, experts, n_sub = x.shape[1], *self.weight.shape[:2]
        own, gates, constant = self.weight[:, :, :hidden], self.weight[:, :, hidden:-1], self.weight[:, :, -1]
        every = torch.nn.functional.linear(x.float(), own.flatten(0, 1), constant.flatten())
        log = of_choices(every.view(-1, experts, n_sub), index)
        if self.parts.gates:
            g = (gate_activations_all(self.parts, x, index) * self.scale[index]).sqrt().flatten(2)
            log = log + torch.einsum("tkg,tkng->tkn", g, gates[index])
        return log.clamp(max=CEILING).exp()

    def parameters_per_expert(self) -> int:
        return self.weight[0].numel()

    @property
    def reads_gates(self) -> bool:
        return self.parts.gates > 0


def _by_type(parts: list[MatrixPart]) -> list[list[MatrixPart]]:
    """The predictor's part and the gate neurons', which one product takes together where both are float32."""
    predictor, *gates = parts
    same = not gates or gates[0].matrix.tensor.dtype == predictor.matrix.tensor.dtype
    return [parts] if same else [[predictor], gates]
