"""The cost file of a scheduler (`serve --save-cost`)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen
from pydantic import Field, RootModel

from .common import Amount, Blocks, Count, Experts, Form, Name

MEASURE = "measure the cost model again"


class FactsForm(Form):
    """`LayerFacts`."""

    experts: Experts
    parts: Blocks
    chosen: Experts


class CoefficientsForm(Form):
    """Seconds per unit."""

    step: Amount
    prefill_token: Amount
    decode_token: Amount
    prefill_slot: Amount
    decode_slot: Amount
    prefill_pair: Amount
    decode_pair: Amount
    block: Amount


class FitErrorForm(Form):
    """`FitError`."""

    median: Amount
    p90: Amount
    samples: Count


class CostForm(Form):
    """The whole file."""

    version: Literal[1]
    facts: FactsForm
    coefficients: CoefficientsForm
    error: FitErrorForm | None = None
    everywhere: Annotated[float, Field(gt=0, le=1e6)]
    corrections: Annotated[dict[Name, Annotated[float, Field(gt=0, le=1e6)]], MaxLen(1 << 16)]


class TimesForm(RootModel[Annotated[dict[Annotated[str, MaxLen(1024)], Annotated[list[Amount], MaxLen(16)]], MaxLen(1 << 16)]]):
    """`layer-times.json` of the user's cache: what a layer of a name took on this machine."""
