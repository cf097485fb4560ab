"""How much a text says about what it was made from, in nats (agentic mutual information, arXiv 2512.21720).

Of N contexts x and one text z from each, with the model's own log-probabilities: the mean over i of log p(z_i | x_i) - log mean_j
p(z_i | x_j). It is a contrastive bound, so it is log N at most, and it is 0 where a text is as likely behind every context. With x a prompt
and z what the model writes at an operating point, it says how much of the prompt is left in the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..elastic.bind import bind
from ..elastic.runtime import Elastic
from ..errors import UsageError
from ..point import FULL, OperatingPoint


@dataclass(frozen=True)
class Information:
    """nats: the mean over texts; each: of every text [N]; per_token: nats per token of the texts."""

    nats: float
    each: Tensor
    per_token: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mean over texts, by the normal approximation."""
        half = 1.96 * float(self.each.std()) / math.sqrt(len(self.each))
        return self.nats - half, self.nats + half


def mutual_information(log_p: Tensor) -> Tensor:
    """[N] nats of each text, from log_p[i, j] = log p(z_i | x_j) [N, N]. Their mean is never above log N. UsageError for no such matrix."""
    if log_p.ndim != 2 or log_p.shape[0] != log_p.shape[1] or not len(log_p):
        raise UsageError(
            f"log-probabilities of shape {tuple(log_p.shape)}", "give [N, N], a row per text and a column per context"
        )
    log_p = log_p.double()
    return log_p.diagonal() - (log_p.logsumexp(1) - math.log(len(log_p)))


@torch.no_grad()
def log_probabilities(model: Any, contexts: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
    """[N, N] of every text of token ids [m] behind every context [t], at the model's current operating point."""
    rows = []
    for text in texts:
        row = torch.zeros(len(contexts))
        for length in {len(context) for context in contexts}:  # those of one length run together
            which = [j for j, context in enumerate(contexts) if len(context) == length]
            ids = torch.stack([torch.cat([contexts[j], text]) for j in which]).to(model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(text) + 1).logits[:, -len(text) - 1 : -1].float()
            log_p = logits.log_softmax(-1).gather(2, ids[:, -len(text) :, None])[..., 0].sum(1)
            row[which] = log_p.cpu()
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def answer_information(model: Any, contexts: Sequence[Tensor], point: OperatingPoint, tokens: int, seed: int = 0) -> Information:
    """What answers drawn at a point say of their contexts, as the full model judges it. contexts: token ids [t] each.

    Every answer has so many tokens, drawn at temperature 1.
    """
    elastic: Elastic = model._moe_prism
    torch.manual_seed(seed)
    texts = []
    with elastic.at(bind(elastic, [point])):
        for context in contexts:
            made = model.generate(
                input_ids=context[None].to(model.device), attention_mask=torch.ones(1, len(context), device=model.device),
                max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            texts.append(made[0, len(context) :].cpu())
    with elastic.at(bind(elastic, [FULL])):
        each = mutual_information(log_probabilities(model, contexts, texts))
    return Information(float(each.mean()), each, float(each.mean()) / tokens)
