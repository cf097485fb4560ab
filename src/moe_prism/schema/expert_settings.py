"""What `moe-prism offload fit` writes, and `--expert-settings` reads."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen, MinLen
from pydantic import Field

from .common import MOST_LAYERS, Experts, FileName, Form, Name, Plain, Positive, Sha256

AGAIN = "fit it again: moe-prism offload fit TRACE"
MOST_WIDTH = 1 << 20


class PredictorForm(Form):
    """What is read ahead. file: a safetensors file beside the settings; without one the predictor needs no arrays."""

    name: Name
    width: Annotated[int, Field(ge=0, le=MOST_WIDTH)]
    file: FileName | None = None
    sha256: Sha256 | None = None


class ExpertSettingsForm(Form):
    """The whole file. layers, experts, parts: the keys it was fitted for; slots: how many of them fitted; miss_shares: T1 and T2.

    prompt_rate: share of a prompt's uses whose experts are read in the smaller form. expert_bits: of every layer, of each expert.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")]
    kind: Literal["expert settings"]
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    experts: Experts
    parts: Annotated[int, Field(ge=1, le=4096)]
    slots: Positive
    policy: Name
    settings: Plain = {}
    quotas: Annotated[list[Positive], MinLen(1), MaxLen(MOST_LAYERS)] | None = None
    predictor: PredictorForm | None = None
    miss_shares: Annotated[list[Annotated[float, Field(ge=0, le=1)]], MinLen(2), MaxLen(2)] | None = None
    prompt_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    expert_bits: Annotated[list[list[Annotated[int, Field(ge=1, le=8)]]], MinLen(1), MaxLen(MOST_LAYERS)] | None = None
    made: Plain = {}
