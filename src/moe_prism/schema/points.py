"""Operating points as files hold them: `plan.json`, the rows of `frontier.json`, levels of `ladder.json`, skip plans of version 0.1."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen, MinLen
from pydantic import Field

from .common import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_POINTS,
    MOST_RANKS,
    Amount,
    Blocks,
    Budget,
    Count,
    Experts,
    Form,
    Name,
    Number,
    Plain,
    Positive,
    Share,
    Text,
)

REMAKE = "write it again with `moe-prism frontier` or `moe-prism skip`"
MEASURE = "delete it; it is measured again at start"
MOST_NUMBERS = 1 << 22
Weights = Annotated[list[Annotated[list[Number], MinLen(1), MaxLen(MOST_NUMBERS)]], MinLen(1), MaxLen(MOST_LAYERS)]
"""Numbers per layer, which for a small network are many."""
Rows = Annotated[list[Annotated[list[Number], MinLen(1), MaxLen(MOST_RANKS)]], MinLen(1), MaxLen(MOST_LAYERS)]
"""Numbers per layer."""
Chosen = Annotated[int, Field(ge=1, le=MOST_EXPERTS)]


class WeightsForm(Form):
    """A change of the weights."""

    change: Name
    settings: Plain = {}


class StageForm(Form):
    """One stage of routing."""

    layers: Annotated[list[Chosen], MinLen(1), MaxLen(MOST_LAYERS)]
    stage: Name
    parameters: dict[Name, Weights] = {}
    keep_mass: bool | None = None


Width = Annotated[float, Field(gt=0, le=64)]


class BitRouterForm(Form):
    """What chooses the bits of a slot before it is read: per layer numbers of every expert in base64, and quantiles."""

    rows: Annotated[list[Annotated[str, MinLen(1), MaxLen(1 << 28)]], MinLen(1), MaxLen(MOST_LAYERS)]
    levels: Rows


class SlotBitsForm(Form):
    """At how many bits a slot may be read."""

    widths: Annotated[list[Width], MinLen(1), MaxLen(64)]
    errors: Rows
    group: Annotated[int, Field(ge=1, le=1 << 20)]
    choosing: Width
    router: BitRouterForm | None = None


class TollForm(Form):
    """What sending a token costs."""

    price: Annotated[float, Field(ge=0, le=1e6)]
    devices: Annotated[int, Field(ge=0, le=MOST_EXPERTS)] = 0


class SlotsForm(Form):
    """Which slots are kept. `of` and `control` are missing in a file from before there was a choice."""

    rule: Name
    budget: Budget = 1.0
    scorer: Name = "ridge"
    compensate: bool = True
    layers: Annotated[list[Budget], MinLen(1), MaxLen(MOST_LAYERS)] | None = None
    of: Literal["bytes", "slots", "value"] | None = None
    control: Literal["mean", "strict", "none"] = "none"
    bits: SlotBitsForm | None = None
    toll: TollForm | None = None


class DecodingForm(Form):
    """How the next token follows."""

    method: Name
    settings: Plain = {}


class PointForm(Form):
    """An operating point of this version."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    weights: WeightsForm | None = None
    routing: Annotated[list[StageForm], MaxLen(16)] = []
    slots: SlotsForm | None = None
    decoding: DecodingForm | None = None


class NamedForm(Form):
    """The file of one point."""

    kind: Literal["operating point"] = "operating point"
    name: Name | None = None
    point: PointForm
    made: Plain = {}


class SkipPlanForm(Form):
    """`plan.json` of version 0.1."""

    kind: Literal["skip plan"] = "skip plan"
    layers: Annotated[dict[Name, Chosen], MinLen(1), MaxLen(MOST_LAYERS)]
    policy: Name = "top-n"
    parameters: dict[Name, Rows] = {}
    keep_mass: bool | None = None
    mean: Number | None = None
    made: Plain = {}


class TimeForm(Form):
    """`DecodeTime` of `frontier.json`."""

    batch: Positive
    ms_per_token: Amount
    low: Amount
    high: Amount
    of_stock: Amount
    turns: Positive


Bits = Annotated[float, Field(ge=0, le=64)]


class QuantizeForm(Form):
    """Settings of the weight change `quantize`: bits of all experts, or per layer of all its experts or of each."""

    codec: Name
    options: Plain = {}
    bits: Bits | Annotated[list[Bits | Annotated[list[Bits], MinLen(1), MaxLen(MOST_EXPERTS)]], MinLen(1), MaxLen(MOST_LAYERS)]
    group: Annotated[int, Field(ge=0, le=1 << 20)]


class SmoothForm(QuantizeForm):
    """Settings of the weight change `smooth`."""

    exponents: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=-64, le=64)]], MinLen(1), MaxLen(1 << 20)]], MinLen(1), MaxLen(MOST_LAYERS)
    ]
    steps: Annotated[int, Field(ge=1, le=16)] = 1
    router: Annotated[int, Field(ge=0, le=8)] = 0
    clips: Annotated[list[Annotated[float, Field(gt=0, le=1)]], MaxLen(MOST_LAYERS)] = []


class BandsForm(Form):
    """Settings of the weight change `bands`: per layer and expert a digit for each neuron, its bits."""

    codec: Name
    options: Plain = {}
    neurons: Annotated[
        list[Annotated[list[Annotated[str, MinLen(1), MaxLen(1 << 16)]], MinLen(1), MaxLen(MOST_EXPERTS)]],
        MinLen(1),
        MaxLen(MOST_LAYERS),
    ]
    group: Annotated[int, Field(ge=1, le=1 << 20)]


class NeuronsForm(Form):
    """The neurons of a layer that stay: a bit for each, as base64."""

    experts: Experts
    neurons: Annotated[int, Field(ge=1, le=1 << 24)]
    kept: Annotated[str, MaxLen(1 << 28)]


class SliceForm(Form):
    """Settings of the weight change `slice`."""

    layers: Annotated[list[NeuronsForm], MinLen(1), MaxLen(MOST_LAYERS)]


class MergedForm(Form):
    """The experts of a layer that share weights."""

    neurons: Annotated[int, Field(ge=1, le=1 << 24)]
    groups: Annotated[list[Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]], MinLen(1), MaxLen(MOST_EXPERTS)]
    weights: Annotated[list[Amount], MinLen(1), MaxLen(MOST_EXPERTS)]
    orders: Annotated[str, MaxLen(1 << 30)]


class MergeForm(Form):
    """Settings of the weight change `merge`."""

    layers: Annotated[list[MergedForm], MinLen(1), MaxLen(MOST_LAYERS)]


class SubspaceForm(MergeForm):
    """Settings of the weight change `subspace`."""

    hidden: Annotated[int, Field(ge=1, le=1 << 20)]
    rank: Annotated[int, Field(ge=1, le=1 << 20)]
    scales: Annotated[list[Annotated[list[Annotated[float, Field(gt=0)]], MinLen(1), MaxLen(1 << 20)]], MaxLen(MOST_LAYERS)] = []
    whole: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]], MaxLen(MOST_EXPERTS)]], MaxLen(MOST_LAYERS)
    ] = []


class SparseRowForm(Form):
    """The weights of a layer that stay."""

    experts: Experts
    density: Annotated[float, Field(gt=0, le=1)]
    inputs: Annotated[str, MaxLen(1 << 30)]
    middle: Annotated[str, MaxLen(1 << 30)]


class SparseForm(Form):
    """Settings of the weight change `sparse`."""

    layers: Annotated[list[SparseRowForm], MinLen(1), MaxLen(MOST_LAYERS)]


class ChainForm(Form):
    """Settings of the weight change `chain`."""

    edits: Annotated[list[WeightsForm], MinLen(1), MaxLen(16)]


class DomainForm(Form):
    """`DomainQuality` of `frontier.json`."""

    ppl: Amount
    kl: Number
    top1_agreement: Share


class SliceScoreForm(Form):
    """`SliceScore` of `frontier.json`."""

    kept: Share
    stderr: Amount
    right: Share
    full: Share
    flips: Share
    items: Positive
    is_ability: bool = True


class MeasuredForm(Form):
    """One entry of `frontier.json`; what has a default is missing in older files."""

    name: Name
    rule: Name
    budget: Share
    k_slots: Amount
    ppl: Amount
    kl: Number
    top1_agreement: Share
    active_expert_params: Amount
    active_expert_bytes: Amount
    flops_per_token: Amount
    pareto: bool
    resident_expert_bytes: Amount = 0.0
    distinct_expert_bytes: Amount = 0.0
    sends: Amount = 0.0
    point: PointForm | None = None
    time: TimeForm | None = None
    domains: Annotated[dict[Name, DomainForm], MaxLen(256)] = {}
    slices: Annotated[dict[Name, SliceScoreForm], MaxLen(256)] = {}


Measured = Annotated[list[MeasuredForm], MaxLen(MOST_POINTS)]


class FrontierForm(Form):
    """`frontier.json`."""

    model: Text
    source: Text
    n_sub: Blocks
    points: Measured
    baseline_topk: Measured
    baseline_bits: Measured = []
    provenance: Plain


class LevelForm(Form):
    """One entry of `ladder.json`; version 0.1 wrote a budget of the threshold rule instead of a point."""

    name: Name
    slots: Annotated[float, Field(gt=0, le=MOST_EXPERTS)]
    quality: Share
    point: PointForm | None = None
    budget: Budget | None = None


class LadderForm(Form):
    """`ladder.json`."""

    levels: Annotated[list[LevelForm], MaxLen(255)]
    tokens: Count = 0
    text: Text = ""


class GroupsForm(Form):
    """`RoutingGroups` of a router."""

    count: Experts
    limit: Experts
    least: Annotated[int, Field(ge=0, le=MOST_EXPERTS)]


class KeptForm(Form):
    """The experts of a layer that stay."""

    experts: Experts
    kept: Annotated[list[Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]], MinLen(1), MaxLen(MOST_EXPERTS)]
    groups: GroupsForm | None = None
    masked: bool = False
    constants: Annotated[str, MaxLen(1 << 29)] | None = None


class PruneForm(Form):
    """Settings of the weight change `prune`."""

    layers: Annotated[list[KeptForm], MinLen(1), MaxLen(MOST_LAYERS)]


class RehomedForm(KeptForm):
    """The experts of a layer that stay, and where every neuron of the layer went."""

    masked: Literal[False] = False
    constants: None = None
    neurons: Annotated[int, Field(ge=1, le=1 << 24)]
    weights: Annotated[list[Amount], MinLen(1), MaxLen(MOST_EXPERTS)]
    places: Annotated[str, MaxLen(1 << 30)]


class RehomeForm(Form):
    """Settings of the weight change `rehome`."""

    layers: Annotated[list[RehomedForm], MinLen(1), MaxLen(MOST_LAYERS)]
