"""Fit what a missing expert is read as: itself, its int8 form, or nothing (`Misses.shares`). The loss is measured on the model."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..artefact.load import load
from ..cache_names import cache_argument, made_cache
from ..checkpoint import read_manifest
from ..data import token_windows
from ..data.splits import Side
from ..elastic import operating_point
from ..errors import UsageError
from ..offload.settings import ExpertSettings, write_settings
from ..options.text import source_in
from ..store import StoreOptions
from ..store.choose_misses import Misses
from ..store.layer import resident_bytes

SHARES = (
    (1.0, 1.0),
    (0.8, 1.0),
    (0.6, 1.0),
    (0.4, 1.0),
    (0.0, 1.0),
    (0.8, 0.95),
    (0.6, 0.9),
    (0.4, 0.9),
    (0.0, 0.9),
    (0.4, 0.75),
)
"""(T1, T2) that are tried; the seventh is the paper's. The first reads everything as it is, so its loss is 0."""
LENGTH, PROMPT, TEXTS = 96, 32, 3


@dataclass(frozen=True)
class SharesRow:
    """Thresholds, the KL of what decodes so to what reads everything, and what a token reads.

    ms_per_token: a forecast with nothing read ahead.
    """

    t1: float
    t2: float
    kl: float
    kb_per_token: float
    ms_per_token: float


@dataclass(frozen=True)
class SharesPrices:
    """Milliseconds of a step apart from its reads, and of a record."""

    step: float
    record: float


def fit_shares(
    folder: Path, settings: ExpertSettings, budget: float, prices: SharesPrices, max_kl: float
) -> tuple[SharesRow, list[SharesRow]]:
    """(the fastest thresholds whose KL on calibration text is at most max_kl, on the evaluation side; all on calibration text).

    Decodes both sides of the model's text over a store of `settings`, packed in a temporary folder of the system.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_settings(work / "settings.json", replace(settings, shares=None))
        model, tokenizer = _opened(folder, work, settings)
        store = model._moe_prism.store
        texts = {side: _texts(folder, tokenizer, side) for side in get_args(Side)}
        size = store.pack.layout.bytes

        def decoded(side: Side, misses: Misses) -> tuple[Tensor, float]:
            model._moe_prism.misses = misses
            with operating_point(model, budget):  # anew: what a layer does is settled when a point is set
                return _decoded(model, texts[side])

        wanted = {side: decoded(side, Misses())[0] for side in texts}  # before any int8 form is there

        def row(side: Side, shares: tuple[float, float]) -> SharesRow:
            found, read = decoded(side, Misses(shares=shares))
            kl = float((wanted[side].exp() * (wanted[side] - found)).sum(-1).mean())
            return SharesRow(*shares, kl, read / 1e3, prices.step + prices.record * read / size)

        tried = [row("calibration", shares) for shares in SHARES]
        best = fastest(tried, max_kl)
        held_out = row("evaluation", (best.t1, best.t2))
        store.close()
    return held_out, tried


def fastest(rows: Sequence[SharesRow], max_kl: float) -> SharesRow:
    """Of those within the loss; of equal ones the first."""
    return min((row for row in rows if row.kl <= max_kl or row.t1 == 1), key=lambda row: row.ms_per_token)


def _opened(folder: Path, work: Path, settings: ExpertSettings) -> tuple[Any, Any]:
    """The model over a store of as many records as the settings are for."""
    asked = StoreOptions(
        1 << 62, work / "experts.pack", parts=settings.space.parts, misses=Misses(shares=(0.0, 1.0)), ahead=0,
        fitted=work / "settings.json",
    )  # fmt: skip
    whole, _ = load(folder, store=replace(asked, fitted=None))  # its places take no memory before they are filled
    elastic = whole._moe_prism
    memory = resident_bytes([layer.parts for layer in elastic.layers]) + settings.slots * elastic.store.pack.layout.bytes
    elastic.store.close()
    if elastic.store.space != settings.space:
        raise UsageError(f"the trace is of another model than '{folder}'", "give the folder that it was recorded with")
    return load(folder, store=replace(asked, memory=memory))


def _texts(folder: Path, tokenizer: Any, side: Side) -> Tensor:
    """[TEXTS, LENGTH] tokens."""
    own = read_manifest(folder)["calibration"]
    exclude = own["documents"] if side == "evaluation" else ()
    return token_windows(tokenizer, source_in(own), side, length=LENGTH, tokens=TEXTS * LENGTH, exclude=exclude).ids


@torch.no_grad()
def _decoded(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """(log-probabilities [n, V] after every token behind the prompts, bytes read per token)."""
    times = model._moe_prism.store.times
    found, read = [], []
    for row in ids:
        out = model(input_ids=row[None, :PROMPT], use_cache=True)
        past, before = cache_argument(model, made_cache(out)), times.bytes
        for i in range(PROMPT, len(row)):
            out = model(input_ids=row[None, i : i + 1], use_cache=True, **past)  # the cache grows in place
            found.append(out.logits[0, -1].float().log_softmax(-1))
        read.append((times.bytes - before) / (len(row) - PROMPT))
    return torch.stack(found), statistics.fmean(read)
