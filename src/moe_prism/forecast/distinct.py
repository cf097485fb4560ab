"""U(B, n): how many distinct experts (or sub-experts) of a layer a step of B tokens reads.

A token chooses without replacement, and tokens of different sequences choose independently of each other, so expert e stays unread
with probability (1 - p_e)^B, p_e the share of tokens that choose it, and

    U(B) = sum over e of 1 - (1 - p_e)^B

is exact for any such routing: which experts a token chooses together does not matter for the mean. With even routing p_e = n / E and
U = E (1 - (1 - n/E)^B). Tokens of one sequence (a prompt) are not independent and read fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Shares = NDArray[np.float64]
"""p [..., E]: of all tokens, the share that chooses each expert; the sum over E is the experts per token."""


def uniform(experts: int, chosen: float, batch: float) -> float:
    """U(B, n) of even routing: `chosen` of `experts` per token, `batch` tokens.

    UsageError if chosen is outside (0, experts] or batch negative.
    """
    if not (0 < chosen <= experts and batch >= 0):
        raise UsageError(f"{chosen:g} of {experts} experts for {batch:g} tokens is no routing", "give 0 < chosen <= experts")
    return float(distinct(np.full(experts, chosen / experts), batch))


def distinct(shares: Shares, batch: float) -> Shares:
    """U(B) [...] of shares [..., E]."""
    with np.errstate(divide="ignore"):  # a share of 1 gives -inf, and exp(-inf B) is what is meant (B = 0: nothing is read)
        unread = np.log1p(-np.clip(shares, 0.0, 1.0))
    return (-np.expm1(unread * batch)).sum(-1) if batch > 0 else np.zeros(shares.shape[:-1])


def kept_shares(shares: Shares, keep: int) -> Shares:
    """Shares [..., keep] after all but the `keep` most chosen experts are gone.

    Their tokens choose among the rest: the odds p / (1 - p) of all kept experts grow by one factor per layer, such that a token chooses as
    many as before. UsageError if fewer are kept than that.
    """
    experts = shares.shape[-1]
    chosen = shares.sum(-1, keepdims=True)
    if not 0 < keep <= experts or (chosen > keep + 1e-9).any():
        raise UsageError(f"keeping {keep} of {experts} experts leaves fewer than a token chooses", "keep more")
    top = np.clip(-np.sort(-shares, axis=-1)[..., :keep], 1e-12, 1 - 1e-12)
    odds = np.log(top) - np.log1p(-top)
    low, high = np.zeros_like(chosen), np.full_like(chosen, 80.0)
    for _ in range(60):
        middle = (low + high) / 2
        short = _logistic(odds + middle).sum(-1, keepdims=True) < chosen
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return _logistic(odds + high)


def _logistic(z: Shares) -> Shares:
    return 1 / (1 + np.exp(-z))


@dataclass(frozen=True)
class Routing:
    """How a model's tokens choose: ranks[l] is [k, E], the share of tokens whose i-th heaviest choice at layer l is expert e."""

    ranks: tuple[Shares, ...]
    tokens: int = 0  # counted; 0: assumed

    @classmethod
    def even(cls, layers: Sequence[tuple[int, int]]) -> Routing:
        """Even routing at layers of (experts, experts per token)."""
        return cls(tuple(np.full((chosen, experts), 1 / experts) for experts, chosen in layers))

    def shares(self, chosen: int | None = None, keep: float = 1.0) -> list[Shares]:
        """p [E] of every layer if tokens take their `chosen` heaviest experts (None: all) out of the share `keep` that pruning leaves."""
        found = []
        for ranks in self.ranks:
            p = ranks[:chosen].sum(0)
            left = kept_experts(len(p), len(ranks), keep)
            found.append(p if left == len(p) else kept_shares(p, left))
        return found

    def distinct(self, batch: float, chosen: int | None = None, keep: float = 1.0) -> list[float]:
        """U(B, n) of every layer."""
        return [float(distinct(p, batch)) for p in self.shares(chosen, keep)]


def kept_experts(experts: int, chosen: int, keep: float) -> int:
    """Experts that pruning to a share leaves, never fewer than a token chooses."""
    return max(chosen, round(experts * keep))
