"""The attention-aware graph of tokens (A-MoE, arXiv 2505.00792): S of `graph` is what the attention before the layer gives to other tokens.

S_ij is a softmax over q_i . k_j of each head, over the token itself and the WINDOW tokens of its request before it, and then the mean over
heads: the queries and keys are those of the attention of the same decoder layer. So S is that attention's matrix on a window, its rows
made to sum to 1. The paper trains with it, and takes the whole matrix; the exact form was not found. Keys are kept beside the cache.
Shapes: T tokens, W of the window, E experts, G heads of keys, d of a head.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...routing.base import Routed
from .graph import Graph, TokenGraph, looked_back

KEYS = "attention graph"


class AttentionGraph(TokenGraph):
    """Scores of the tokens that attention looked at, mixed into a token's own by the share `a`."""

    needs: ClassVar[frozenset[str]] = frozenset({"scores", "past", "attention"})

    @staticmethod
    def near(routed: Routed, scores: Tensor) -> tuple[Tensor, Tensor]:
        asked = routed.attention()
        size = asked.key[0].numel()
        found, known = looked_back(routed, torch.cat([asked.key.float().flatten(1), scores], 1), KEYS)
        keys, theirs = found[:, :, :size], found[:, :, size:]
        return asked.shares(keys.reshape(*keys.shape[:2], *asked.key.shape[1:]), ~known), theirs


class AttentionGraphMethod(Graph):
    """`attention-graph:A`: experts are chosen by the scores of tokens that attention looks at, with the share A."""

    needs: ClassVar[tuple[str, ...]] = ("router probabilities", "attention", "earlier tokens")
    stage: ClassVar[type[TokenGraph]] = AttentionGraph
