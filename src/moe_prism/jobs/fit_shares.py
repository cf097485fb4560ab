"""Fit what a missing expert is read as: itself, its int8 form, or nothing (`Misses.shares`, `Misses.prompt_rate`).

The loss is measured on the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

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
from ..store.record_store import RecordStore

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
RATES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Prompt rates that are tried; the fourth and fifth are the paper's. The first reads everything as it is."""
LENGTH, TEXTS = 96, 3
PROMPT = 32  # tokens of a text before thresholds are tried on the others
LONG_PROMPT = 80  # before rates are tried on the prompt and on what follows


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
class RateRow:
    """A prompt rate, the KL of prompts and of what is decoded behind them, and what a token of a prompt reads."""

    rate: float
    kl: float
    kb_per_token: float


@dataclass(frozen=True)
class SharesPrices:
    """Milliseconds of a step apart from its reads, and of a record."""

    step: float
    record: float


@dataclass(frozen=True)
class LossFit:
    """What is read in a smaller form: thresholds and prompt rate on the evaluation side, and all that were tried on calibration text."""

    shares: SharesRow
    shares_tried: list[SharesRow]
    rate: RateRow
    rates_tried: list[RateRow]


def fit_shares(folder: Path, settings: ExpertSettings, budget: float, prices: SharesPrices, max_kl: float) -> LossFit:
    """The fastest thresholds, and the prompt rate that reads least, whose KL on calibration text is at most max_kl, each alone.

    Decodes both sides of the model's text over a store of `settings`, packed in a temporary folder of the system.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_settings(work / "settings.json", replace(settings, shares=None, prompt_rate=0.0))
        model, tokenizer = _opened(folder, work, settings)
        store = model._moe_prism.store
        texts = {side: _texts(folder, tokenizer, side) for side in get_args(Side)}
        size = store.pack.layout.bytes

        def decoded(side: Side, prompt: int, misses: Misses) -> DecodedSide:
            _forget_low(store)
            model._moe_prism.misses = misses
            with operating_point(model, budget):  # anew: what a layer does is settled when a point is set
                return _decoded(model, texts[side], prompt)

        wanted = {(side, prompt): decoded(side, prompt, Misses()) for side in texts for prompt in (PROMPT, LONG_PROMPT)}

        def row(side: Side, shares: tuple[float, float]) -> SharesRow:
            found = decoded(side, PROMPT, Misses(shares=shares))
            read, kl = found.step_bytes, _kl(wanted[side, PROMPT].steps, found.steps)
            return SharesRow(*shares, kl, read / 1e3, prices.step + prices.record * read / size)

        def rate_row(side: Side, rate: float) -> RateRow:
            found, exact = decoded(side, LONG_PROMPT, Misses(prompt_rate=rate)), wanted[side, LONG_PROMPT]
            whole = _kl(torch.cat([exact.prompts, exact.steps]), torch.cat([found.prompts, found.steps]))
            return RateRow(rate, whole, found.prompt_bytes / 1e3)

        tried = [row("calibration", shares) for shares in SHARES]
        rates = [rate_row("calibration", rate) for rate in RATES]
        best, least = fastest(tried, max_kl), reads_least(rates, max_kl)
        found = LossFit(row("evaluation", (best.t1, best.t2)), tried, rate_row("evaluation", least.rate), rates)
        store.close()
    return found


def fastest(rows: Sequence[SharesRow], max_kl: float) -> SharesRow:
    """Of those within the loss; of equal ones the first."""
    return min((row for row in rows if row.kl <= max_kl or row.t1 == 1), key=lambda row: row.ms_per_token)


def reads_least(rows: Sequence[RateRow], max_kl: float) -> RateRow:
    """Of those within the loss; of equal ones the first."""
    return min((row for row in rows if row.kl <= max_kl or not row.rate), key=lambda row: row.kb_per_token)


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


def _forget_low(store: RecordStore) -> None:
    """Int8 forms leave, so that nobody uses those that another row has read."""
    for key in store.fetcher.low:
        if key in store.cache:
            store.fetcher.lose(key)


class DecodedSide(NamedTuple):
    """Log-probabilities [n, V] of all tokens of prompts, and of those behind them; bytes that each of them reads."""

    prompts: Tensor
    steps: Tensor
    prompt_bytes: float
    step_bytes: float


@torch.no_grad()
def _decoded(model: Any, ids: Tensor, prompt: int) -> DecodedSide:
    times = model._moe_prism.store.times
    prompts, steps, read = [], [], [0, 0]
    for row in ids:
        before = times.bytes
        out = model(input_ids=row[None, :prompt], use_cache=True)
        prompts.append(out.logits[0].float().log_softmax(-1))
        past, behind = cache_argument(model, made_cache(out)), times.bytes
        for i in range(prompt, len(row)):
            out = model(input_ids=row[None, i : i + 1], use_cache=True, **past)  # the cache grows in place
            steps.append(out.logits[0, -1].float().log_softmax(-1))
        read = [read[0] + behind - before, read[1] + times.bytes - behind]
    return DecodedSide(torch.cat(prompts), torch.stack(steps), read[0] / (len(ids) * prompt), read[1] / len(steps))


def _kl(wanted: Tensor, found: Tensor) -> float:
    """Per token, of log-probabilities [n, V]."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())
