"""What a recipe of `moe-prism train` may say."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MaxLen, MinLen
from pydantic import Field, model_validator

from .common import Amount, Budget, Experts, Form, Name, Plain, Positive, Share

Size = Annotated[int, Field(ge=1, le=1 << 20)]
Rate = Annotated[float, Field(gt=0, le=10)]
Few = Annotated[int, Field(ge=1, le=4096)]


class ShapeForm(Form):
    """The sizes of a model. width: neurons of one expert; active: experts per token; context: tokens that it can see."""

    hidden: Size
    layers: Few
    heads: Few
    experts: Experts
    width: Size
    active: Experts
    context: Annotated[int, Field(ge=8, le=1 << 20)] = 512

    @model_validator(mode="after")
    def fits(self) -> ShapeForm:
        """Heads that share the hidden size evenly, with an even share for rotation, and no more active experts than there are."""
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ValueError(f"hidden {self.hidden} is no even multiple of {self.heads} heads")
        if self.active > self.experts:
            raise ValueError(f"active {self.active} of {self.experts} experts")
        return self


class ExchangeForm(Form):
    """What parts of a batch send of their gradients (EControl). share: of the entries, the largest; feedback: of what was left, sent along.

    kind: `plain` sends the largest of what a gradient has, and forgets the rest.
    """

    share: Budget = 0.01
    feedback: Annotated[float, Field(gt=0, le=1)] = 0.1
    kind: Literal["econtrol", "plain"] = "econtrol"


class TrainingForm(Form):
    """A recipe: what is trained, on which text, for how long.

    settings: of the architecture. start: a model whose weights are where training begins, as it is or made into the architecture. bytes:
    in the place of `model`, the largest shape of a mixture in so many bytes. teacher: a model whose probabilities join the loss, with the
    weight `distil`. trained: which parameters move. rate_matrix: Muon's, for matrices; rate_rest: AdamW's. balance, z: weights of the two
    usual losses of routers. decay: the share of the steps in which the rate falls. autocast: multiply in bfloat16; weights stay in
    float32. parts: of a batch, whose gradients are added one after the other, or by several processes. keep_every: steps between two saved
    states; judge_every: steps between two looks at held-out text. stop: end after so many steps, at the rates of a run that goes on.
    store: the type of the checkpoint's weights.
    """

    version: Literal[1] = 1
    architecture: Name | None = None
    settings: Plain = {}
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    tokenizer: Name = "nano"
    text: Annotated[list[Name], MinLen(1), MaxLen(64)] = ["stdlib"]
    tokens: Positive | None = None
    model: ShapeForm | None = None
    bytes: Positive | None = None
    start: Name | None = None
    teacher: Name | None = None
    distil: Amount = 1.0
    trained: Literal["all", "experts", "routers"] = "all"
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    stop: Positive | None = None
    batch: Few = 8
    length: Annotated[int, Field(ge=8, le=1 << 16)] = 512
    rate_matrix: Rate = 0.02
    rate_rest: Rate = 0.004
    balance: Amount = 0.01
    z: Amount = 1e-4
    decay: Share = 0.45
    autocast: bool = False
    parts: Few = 1
    exchange: ExchangeForm | None = None
    keep_every: Positive = 50
    judge_every: Positive = 100
    store: Literal["float32", "bfloat16"] = "float32"

    @property
    def last(self) -> int:
        """Steps that are done."""
        return min(self.steps, self.stop or self.steps)

    @model_validator(mode="after")
    def fits(self) -> TrainingForm:
        """One source of sizes, windows that the model can see, and parts of a batch that are alike."""
        given = [name for name in ("model", "bytes", "start") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"sizes come from {' and '.join(given) or 'nothing'}: give one of model, bytes, start")
        if self.architecture is None and self.start is None:
            raise ValueError("there is no architecture: give one, or a model to start from")
        if self.model is not None and self.length > self.model.context:
            raise ValueError(f"length {self.length} is more than model.context {self.model.context}")
        if self.batch % self.parts:
            raise ValueError(f"batch {self.batch} is no multiple of {self.parts} parts")
        return self
