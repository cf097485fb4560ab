"""What a step costs: seconds as a function of the work in it.

    t = a0 + sum over phases (a1 n + a2 sum_t K_t + a4 pairs) + a3 U

n tokens, K_t kept slots of token t, pairs of a token and an earlier token it attends to, each with one coefficient for prefill and one
for decode, and U the expected number of distinct sub-experts that the step reads (spec section 7; ours: every token may have its own K, so
a mixed step is priced like any other). No coefficient is negative, so t rises in n and in K everywhere, outside the measured range too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..files import replace_file
from ..schema import check, read_form
from ..schema.cost import MEASURE, CostForm

Numbers = Any  # a float, or a float array: the formulas are the same for one step and for many

LEARNING_RATE = 0.05  # of the online correction, per observed step; more while little was observed
WARM = 3  # steps that the prediction before any observation counts for
CORRECTION = (0.2, 5.0)  # an observation outside this ratio is a stall, not a cost


@dataclass(frozen=True)
class LayerFacts:
    """What the sub-experts of a layer are: E experts, N sub-experts each, k experts per token."""

    experts: int
    parts: int
    chosen: int

    @property
    def blocks(self) -> int:
        """Sub-experts of the layer, E N."""
        return self.experts * self.parts

    @property
    def slots(self) -> int:
        """Slots of a token at full budget, k N."""
        return self.chosen * self.parts

    def unread(self, slots: float) -> float:
        """log of the share of sub-experts that a token with this K does not read."""
        return math.log1p(-min(slots / self.blocks, 1 - 1e-9))


@dataclass(frozen=True)
class Totals:
    """The sums over a step's tokens that its cost depends on."""

    prefill: Numbers = 0.0  # tokens
    decode: Numbers = 0.0
    prefill_slots: Numbers = 0.0  # sum of K over tokens
    decode_slots: Numbers = 0.0
    prefill_pairs: Numbers = 0.0  # (token, earlier token) pairs
    decode_pairs: Numbers = 0.0
    unread: Numbers = 0.0  # sum over tokens of LayerFacts.unread(K)

    def columns(self) -> tuple[Numbers, ...]:
        """In the order of the fields."""
        return (
            self.prefill,
            self.decode,
            self.prefill_slots,
            self.decode_slots,
            self.prefill_pairs,
            self.decode_pairs,
            self.unread,
        )

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self.columns(), other.columns(), strict=True)))


def chunk_pairs(tokens: Numbers, computed: Numbers) -> Numbers:
    """Attention pairs of a prefill chunk that follows `computed` tokens."""
    return tokens * computed + tokens * (tokens + 1) / 2


@dataclass(frozen=True)
class Coefficients:
    """Seconds per unit; the names say the unit. None is negative."""

    step: float
    prefill_token: float
    decode_token: float
    prefill_slot: float
    decode_slot: float
    prefill_pair: float
    decode_pair: float
    block: float  # per distinct sub-expert read


@dataclass(frozen=True)
class FitError:
    """Relative error on samples that were not used to fit."""

    median: float
    p90: float
    samples: int


@dataclass(frozen=True)
class StepSample:
    """One measured step."""

    totals: Totals
    seconds: float


class CostModel:
    """Predicts a step's seconds; corrects itself with what is then observed."""

    def __init__(self, facts: LayerFacts, coefficients: Coefficients, error: FitError | None = None) -> None:
        if min(asdict(coefficients).values()) < 0:
            raise UsageError("a cost coefficient is negative", "fit the cost model again")
        self.facts, self.coefficients, self.error = facts, coefficients, error
        self.everywhere = 1.0  # observed / predicted, mean over all steps
        self._corrections: dict[str, float] = {}  # bucket -> observed / predicted; a few dozen buckets exist
        self._seen: dict[str | None, int] = {}  # bucket -> steps observed here; None: all

    @classmethod
    def fit(cls, facts: LayerFacts, samples: Sequence[StepSample], held_out: int = 4) -> CostModel:
        """Non-negative least squares on the relative error; every `held_out`-th sample is kept to report the error, then fitted too.

        UsageError for fewer than 16 samples or a time that is not positive.
        """
        if len(samples) < 16 or any(not 0 < s.seconds < math.inf for s in samples):
            raise UsageError("a cost model needs at least 16 steps of positive, finite time", "measure more steps")
        test = samples[held_out - 1 :: held_out]
        train = [s for i, s in enumerate(samples) if (i + 1) % held_out]
        model = cls(facts, _solve(facts, train))
        off = np.array([abs(model.base(s.totals) / s.seconds - 1) for s in test])
        error = FitError(float(np.median(off)), float(np.quantile(off, 0.9)), len(test))
        return cls(facts, _solve(facts, samples), error)

    # -- predicting

    def base(self, t: Totals) -> Numbers:
        """Seconds of a step by the fitted formula alone. Arrays in, arrays out."""
        return self.linear(t) + self.reading(t.unread)

    def linear(self, t: Totals) -> Numbers:
        """All but the reading of sub-experts."""
        c = self.coefficients
        return (
            c.step
            + c.prefill_token * t.prefill
            + c.decode_token * t.decode
            + c.prefill_slot * t.prefill_slots
            + c.decode_slot * t.decode_slots
            + c.prefill_pair * t.prefill_pairs
            + c.decode_pair * t.decode_pairs
        )

    def reading(self, unread: Numbers) -> Numbers:
        """Seconds of reading each distinct sub-expert once."""
        expm1 = np.expm1 if isinstance(unread, np.ndarray) else math.expm1
        return -self.coefficients.block * self.facts.blocks * expm1(unread)

    def seconds(self, totals: Totals) -> float:
        """Seconds of one step, corrected by what was observed near it."""
        return float(self.base(totals)) * self.correction(totals)

    def prefill(self, tokens: int, slots: float, computed: int = 0) -> float:
        """C_prefill: seconds of a step that computes `tokens` prompt tokens at K = slots after `computed` others."""
        return self.seconds(self.chunk(tokens, slots, computed))

    def decode(self, batch: int, slots: float, context: float) -> float:
        """C_decode: seconds of a step in which `batch` requests with this mean context generate a token at K = slots."""
        return self.seconds(
            Totals(
                decode=batch, decode_slots=batch * slots, decode_pairs=batch * context, unread=batch * self.facts.unread(slots)
            )
        )

    def chunk(self, tokens: int, slots: float, computed: int) -> Totals:
        """The sums of one prefill chunk."""
        return Totals(
            prefill=tokens,
            prefill_slots=tokens * slots,
            prefill_pairs=chunk_pairs(tokens, computed),
            unread=tokens * self.facts.unread(slots),
        )

    # -- learning while serving

    def bucket(self, t: Totals) -> str:
        """Steps alike: same phases, same power of two of tokens, same quarter of the full K."""
        tokens = t.prefill + t.decode
        quarter = math.ceil(4 * (t.prefill_slots + t.decode_slots) / max(tokens * self.facts.slots, 1) - 1e-9)
        phases = ("p" if t.prefill else "") + ("d" if t.decode else "")
        return f"{phases}{int(tokens).bit_length()}.{quarter}"

    def correction(self, totals: Totals) -> float:
        """Observed / predicted near this step; the mean over all steps where none was observed."""
        return self._corrections.get(self.bucket(totals), self.everywhere)

    def observe(self, totals: Totals, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        low, high = CORRECTION
        ratio = min(max(seconds / max(float(self.base(totals)), 1e-9), low), high)  # a short fit may find a price of 0
        bucket, before = self.bucket(totals), self.correction(totals)
        self.everywhere += self._rate(None) * (ratio - self.everywhere)
        self._corrections[bucket] = before + self._rate(bucket) * (ratio - before)

    def _rate(self, bucket: str | None) -> float:
        """The first observations move a mean further: each of n counts 1 / (n + WARM) until that is the learning rate."""
        seen = self._seen[bucket] = self._seen.get(bucket, 0) + 1
        return max(LEARNING_RATE, 1 / (seen + WARM))

    # -- files

    def to_json(self) -> dict[str, Any]:
        """Coefficients and what was learned, as plain JSON values."""
        return {
            "version": 1,
            "facts": asdict(self.facts),
            "coefficients": asdict(self.coefficients),
            "error": asdict(self.error) if self.error else None,
            "everywhere": self.everywhere,
            "corrections": dict(sorted(self._corrections.items())),
        }

    @classmethod
    def from_json(cls, data: object, where: str = "cost model") -> CostModel:
        """CorruptError names `where` if a field is missing, unknown, of the wrong kind, or out of range."""
        return cls.of_form(check(CostForm, data, where, MEASURE))

    @classmethod
    def of_form(cls, form: CostForm) -> CostModel:
        """What a checked file says."""
        model = cls(
            LayerFacts(**form.facts.model_dump()),
            Coefficients(**{name: float(value) for name, value in form.coefficients.model_dump().items()}),
            None if form.error is None else FitError(**form.error.model_dump()),
        )
        model.everywhere = float(form.everywhere)
        model._corrections = {name: float(value) for name, value in form.corrections.items()}
        return model

    def save(self, path: Path) -> None:
        """Write JSON; a reader meets the old file or the new one."""
        replace_file(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read what `save` wrote. UsageError if there is no such file, CorruptError if it is no cost model."""
        if not path.exists():
            raise UsageError(f"no cost model at {path}", "leave --cost out, and --save-cost FILE keeps what is measured")
        return cls.of_form(read_form(CostForm, path, MEASURE))


def _solve(facts: LayerFacts, samples: Sequence[StepSample]) -> Coefficients:
    from scipy.optimize import nnls  # slow to import, and only fitting needs it

    rows: NDArray[np.float64] = np.array(
        [[1.0, *s.totals.columns()[:6], -facts.blocks * math.expm1(s.totals.unread)] for s in samples], dtype=np.float64
    )
    rows /= np.array([s.seconds for s in samples])[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    found, _ = nnls(rows / scale, np.ones(len(samples)))
    return Coefficients(*(float(a) for a in found / scale))
