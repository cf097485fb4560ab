"""`prism.json`: what a folder holds, closed by kind."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen, MinLen
from pydantic import Field

from .common import (
    MOST_DOCUMENTS,
    MOST_EXPERTS,
    MOST_FILES,
    MOST_LAYERS,
    Amount,
    Blocks,
    Count,
    Experts,
    FileName,
    Form,
    InnerName,
    Name,
    Number,
    Plain,
    Sha256,
    Share,
    Text,
)
from .points import Measured

NEXT = "restore the folder from a copy, or build it again"
MOST_DOMAINS = 256
Width = Annotated[int, Field(ge=1, le=1 << 24)]


class FileForm(Form):
    """A file of the folder."""

    sha256: Sha256
    bytes: Count


class SourceForm(Form):
    """What a folder was made of."""

    name: Name
    files: Annotated[dict[InnerName, Sha256], MaxLen(MOST_FILES)]


class CompanionsForm(Form):
    """What lies beside the weights of a source: its licence, and what does not travel, with the reason."""

    licence: Annotated[dict[Name, Text], MaxLen(16)]
    left_out: Annotated[dict[Text, Text], MaxLen(MOST_FILES)]


class DequantizedForm(Form):
    """A quantized source that is written as a plain one."""

    format: Name
    dtype: Name
    weights: Count
    left_out: Annotated[list[Text], MaxLen(1 << 20)] = []


class ProfileForm(Form):
    """What a layer alone costs at one budget."""

    rule: Name
    budget: Share
    kl: Number


class LayerForm(Form):
    """Facts of one layer."""

    name: Name
    experts: Experts
    width: Width
    cost_share: Amount
    starved: Annotated[list[Annotated[int, Field(ge=0, lt=MOST_EXPERTS)]], MaxLen(MOST_EXPERTS)]
    sensitivity: Number | None = None
    profile: Annotated[list[ProfileForm], MaxLen(4096)] | None = None


class TextSourceForm(Form):
    """A text of several domains, or of named fields: `TextSource`."""

    parts: Annotated[list[Annotated[list[Text], MinLen(2), MaxLen(2)]], MinLen(1), MaxLen(MOST_DOMAINS)]
    fields: Annotated[list[Text], MaxLen(256)]


class ReadForm(Form):
    """What a reader left out of a text, and what it doubts, by reason: `TextTally`."""

    source: Text
    documents: Count
    left_out: Annotated[dict[Name, Count], MaxLen(256)] = {}
    remarks: Annotated[dict[Name, Count], MaxLen(256)] = {}


class TasksForm(Form):
    """The model's own answers of `calibrate --tasks`."""

    answered: Count
    answer_tokens: Count
    ended: Count
    left_out: Annotated[dict[Name, Count], MaxLen(256)] = {}


class WindowsForm(Form):
    """Which text was run: `Windows.facts`. domains: tokens of each."""

    text: Text
    tokens: Count
    text_source: TextSourceForm | None = None
    domains: Annotated[dict[Name, Count], MaxLen(MOST_DOMAINS)] = {}
    read: Annotated[list[ReadForm], MaxLen(MOST_DOMAINS)] = []


class CalibrationForm(WindowsForm):
    """On what an elastic model was calibrated."""

    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)]
    capacity: Count


class PassForm(CalibrationForm):
    """Facts of a calibration."""

    layers: Annotated[list[Name], MinLen(1), MaxLen(MOST_LAYERS)]
    length: Count
    windows: Count
    tasks: TasksForm | None = None
    part: Annotated[list[Annotated[int, Field(ge=0, le=4096)]], MinLen(2), MaxLen(2)] | None = None


class RecoveryForm(WindowsForm):
    """One step of `recover`; what has a default belongs to one of its methods."""

    method: Name
    inputs: Plain
    resident_bytes: Annotated[int, Field(ge=-(1 << 50), le=1 << 50)]
    resident_share: Number
    budgets: Annotated[list[Share], MaxLen(64)] = []
    bands: Blocks | None = None
    steps: Count | None = None
    rate: Number | None = None
    seed: int | None = None
    loss: Name | None = None
    curriculum: Name | None = None
    trained: Annotated[list[Text], MaxLen(MOST_LAYERS * 4)] = []


class AlignForm(Form):
    """What `--align` made of the number of sub-experts."""

    group: Width
    n_sub_asked: Blocks
    block: Width


class AdoptedForm(Form):
    """Of weights that another tool quantized: where from, how much they resemble, and what they cost."""

    format: Name
    inputs: Plain
    cosine_mean: Number
    cosine_least: Number
    kl: Number
    kl_tokens: Count
    kl_text: Name
    half_budget_kl: Number | None = None


class ManifestForm(Form):
    """What every kind has."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    versions: Annotated[dict[Name, Name], MaxLen(64)]
    files: Annotated[dict[InnerName, FileForm], MaxLen(MOST_FILES)]
    sha256: Sha256
    source: SourceForm
    recipe: Plain | None = None


class ElasticForm(ManifestForm):
    """An elastic model."""

    kind: Literal["elastic"]
    companions: CompanionsForm
    n_sub: Blocks
    gates: Annotated[int, Field(ge=0, le=1 << 16)]
    bytes_per_weight: Annotated[float, Field(gt=0, le=16)]
    layers: Annotated[list[LayerForm], MinLen(1), MaxLen(MOST_LAYERS)]
    options: Plain
    calibration: CalibrationForm
    dequantized: DequantizedForm | None = None
    align: AlignForm | None = None
    kept_format: Plain | None = None
    operating_points: Measured | None = None
    caches: Annotated[list[FileName], MaxLen(64)] = []
    recovery: Annotated[list[RecoveryForm], MaxLen(64)] = []
    pruning: Plain | None = None
    adopted: AdoptedForm | None = None
    weights_file: FileName | None = None


class PrunedForm(ManifestForm):
    """A pruned checkpoint."""

    kind: Literal["pruned"]
    companions: CompanionsForm
    dequantized: DequantizedForm | None = None
    pruning: Plain
    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)]


class QuantizedForm(ManifestForm):
    """A checkpoint with its experts in fewer bits."""

    kind: Literal["quantized"]
    companions: CompanionsForm
    dequantized: DequantizedForm | None = None
    compression: Plain
    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)] = []


class SlicedForm(ManifestForm):
    """A checkpoint without some of its neurons. result: how many stayed, and where."""

    kind: Literal["sliced"]
    companions: CompanionsForm
    dequantized: DequantizedForm | None = None
    compression: Plain
    statistics: Plain | None
    result: Plain
    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)]


class ReslicedForm(ManifestForm):
    """A checkpoint whose experts are the sub-experts of an elastic model. reslicing: their number and factor. recovery: of the router."""

    kind: Literal["resliced"]
    companions: CompanionsForm
    reslicing: Plain
    calibration: CalibrationForm
    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)]
    recovery: Annotated[list[RecoveryForm], MaxLen(64)] = []


class SplitForm(ManifestForm):
    """A dense model that was split into experts. result: which way, and what every layer lost."""

    kind: Literal["split"]
    companions: CompanionsForm
    dequantized: DequantizedForm | None = None
    splitting: Plain
    result: Plain
    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)]


class TrainedForm(ManifestForm):
    """A checkpoint that was trained here. training: its recipe; result: how long, and to which loss; documents: those it was trained on."""

    kind: Literal["trained"]
    inputs: Plain
    training: Plain
    result: Plain
    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)]
    companions: CompanionsForm | None = None
    """Of the model that it began from."""


class MergedModelForm(ManifestForm):
    """A checkpoint whose experts were merged. result: how many stayed."""

    kind: Literal["merged"]
    companions: CompanionsForm
    dequantized: DequantizedForm | None = None
    compression: Plain
    statistics: Plain | None
    result: Plain
    documents: Annotated[list[Sha256], MaxLen(MOST_DOCUMENTS)]


class StatisticsForm(ManifestForm):
    """A calibration."""

    kind: Literal["calibration"]
    options: Plain
    facts: PassForm


KINDS: dict[str, type[ManifestForm]] = {
    "elastic": ElasticForm,
    "pruned": PrunedForm,
    "quantized": QuantizedForm,
    "sliced": SlicedForm,
    "resliced": ReslicedForm,
    "split": SplitForm,
    "merged": MergedModelForm,
    "trained": TrainedForm,
    "calibration": StatisticsForm,
}
