"""A small learned path predictor in the manner of ExpertFlow (arXiv 2410.17954): all layers' experts from token ids, before layer 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ..keys import KeySpace
from ..trace import Array, Trace
from .base import HISTORY, Predictor, Seen, checked, chosen, history
from .token_table import TokenTable

WIDTH, HIDDEN = 32, 192
PASSES, BATCH, RATE, DROPOUT = 12, 128, 3e-3, 0.2


class Path(Predictor):
    """Logit of the token table + a network of the current and the last 4 token ids: embeddings, two mixing layers, L heads.

    Binary cross-entropy on the true choices, as in the paper; its T5 encoder-decoder is replaced by a window of ids, because a
    routing at the first layers depends on little more. The network learns what the table does not know.
    """

    def __init__(self, table: TokenTable, net: _Net) -> None:
        self.table, self.net = table, net

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace, *, seed: int = 0) -> Self:
        table = TokenTable.fit(trace, space)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = _Net(table.ids, space)
            x = net.slots(trace.token, history(trace))
            y = torch.from_numpy(np.stack([chosen(trace, layer) for layer in range(space.layers)], axis=1))
            _train(net, x, _held_out(trace, table, space), y)
        return cls(table, net.eval())

    def arrays(self) -> dict[str, Array]:
        return {**self.table.arrays(), **{f"net.{name}": t.detach().numpy() for name, t in self.net.state_dict().items()}}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], space: KeySpace, hidden: int) -> Self:
        table = TokenTable.from_arrays({n: a for n, a in arrays.items() if not n.startswith("net.")}, space, hidden)
        net = _Net(table.ids, space)
        given = {name.removeprefix("net."): a for name, a in arrays.items() if name.startswith("net.")}
        found = checked(given, {name: tuple(t.shape) for name, t in net.state_dict().items()})
        net.load_state_dict({name: torch.from_numpy(a) for name, a in found.items()})
        return cls(table, net.eval())

    @torch.no_grad()
    def at(self, layer: int, seen: Seen) -> Array:
        base = _logit(self.table.at(layer, seen))
        extra: Array = self.net(self.net.slots(seen.token, seen.history))[:, layer].numpy()
        return base + extra


class _Net(nn.Module):
    def __init__(self, ids: Array, space: KeySpace) -> None:
        super().__init__()
        self.ids = ids
        self.shape = (space.layers, space.experts)
        self.embed = nn.Embedding(len(ids) + 2, WIDTH)  # + unknown + before the beginning
        self.mix = nn.Sequential(
            nn.Linear((1 + HISTORY) * WIDTH, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, HIDDEN), nn.GELU()
        )
        self.heads = nn.Linear(HIDDEN, space.layers * space.experts)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def slots(self, token: Array, past: Array) -> Tensor:
        """Rows of the embedding [T, 1 + HISTORY]."""
        ids = np.c_[token, past].astype(np.int64)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        at = np.where(self.ids[at] == ids, at, len(self.ids))
        return torch.from_numpy(np.where(ids < 0, len(self.ids) + 1, at))

    def forward(self, slots: Tensor) -> Tensor:
        out: Tensor = self.heads(self.mix(self.embed(slots).flatten(1)))
        return out.view(-1, *self.shape)


def _train(net: _Net, x: Tensor, base: Tensor, y: Tensor) -> None:
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    steps = PASSES * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    net.train()
    for _ in range(PASSES):
        for rows in torch.split(torch.randperm(len(x)), BATCH):
            optimiser.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(net(x[rows]) + base[rows], y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()


def _held_out(trace: Trace, table: TokenTable, space: KeySpace) -> Tensor:
    """[T, L, E] the table's logits for its own training rows, each row taken out of its token's count.

    Otherwise the table looks certain about rare tokens in training and the network never learns to correct it.
    """
    from .token_table import SMOOTHING

    which = np.searchsorted(table.ids, trace.token)
    total = np.bincount(which)[which][:, None, None]
    used = np.stack([chosen(trace, layer) for layer in range(space.layers)], axis=1)
    without = (table.shares[which] * (total + SMOOTHING) - used) / (total - 1 + SMOOTHING)
    return torch.from_numpy(_logit(without).astype(np.float32))


def _logit(p: Array) -> Array:
    p = np.clip(p, 1e-3, 1 - 1e-3)
    out: Array = np.log(p) - np.log1p(-p)
    return out
