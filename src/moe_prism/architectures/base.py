"""What an architecture brings to training: its configuration, its model, and the parts of a step beside the loss of the next token.

Shapes: B windows of L tokens, T = B L tokens, d hidden, E experts of f neurons, k experts per token, C columns of a router (E, and more
where there are experts that hold no matrices), V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..schema.common import Form
from ..schema.training import ShapeForm

WEIGHTS = "_moe_prism_trained_as"
"""The attribute of an experts module that says as what its matrices are computed: a function of a parameter [E, o, i]."""
FILTER = "_moe_prism_filter"
"""The attribute of an experts module that changes its activations: (module, a [S, f], pairs) -> a [S, f]."""


@dataclass(frozen=True)
class ChosenPairs:
    """The chosen pairs in the order of their experts. token, choice [S]: where each stands; weight [S]; spans: rows of every expert."""

    token: Tensor
    choice: Tensor
    weight: Tensor
    spans: Sequence[tuple[int, int]]
    tokens: int
    choices: int


class StepPlace(NamedTuple):
    """Where a training stands. step: how many are done; steps: of the whole run; seed: what draws follow from; part: of the batch."""

    step: int
    steps: int
    seed: int
    part: int = 0

    @property
    def share(self) -> float:
        """Of the steps, 0 at the first one."""
        return self.step / self.steps

    def generator(self, purpose: int, *, whole: bool = False) -> torch.Generator:
        """A stream of draws of this step alone: a run that goes on after a kill draws the same.

        purpose: one number per user; whole: the same for all parts of the batch.
        """
        part = 0 if whole else self.part
        return torch.Generator().manual_seed((((self.seed * 1_000_003 + self.step) * 4099 + part) * 101 + purpose) % (1 << 63))


@dataclass(frozen=True)
class LayerRouting:
    """What the router of one layer said of a batch: logits [T, C], weights [T, k], ids [T, k] (below C; others mean no expert)."""

    logits: Tensor
    weights: Tensor
    ids: Tensor

    @property
    def chosen(self) -> Tensor:
        """[T, C] float: 1 where a token chose a column."""
        columns = self.logits.shape[1]
        there = (self.ids >= 0) & (self.ids < columns)
        return torch.zeros_like(self.logits).scatter_reduce_(
            1, self.ids.clamp(0, columns - 1), there.to(self.logits.dtype), "amax"
        )


@dataclass(frozen=True)
class StepSeen:
    """One step as losses see it: token ids [B, L], logits [B, L, V] of the next tokens, and every layer's routing, in their order.

    Of another task ids and logits are what it is given and what it says, [B, n] both.

    again: runs the model on the same ids once more, without recording.
    """

    place: StepPlace
    ids: Tensor
    logits: Tensor
    routings: Sequence[LayerRouting]
    again: Callable[[], Tensor]


class TrainingPart:
    """One thing that happens in training beside the next token's loss. What it does not override does nothing."""

    def start(self, model: nn.Module) -> None:
        """Once, when the weights are in place and before there are optimisers: freeze parameters, keep what is needed."""

    def begin(self, model: nn.Module, place: StepPlace) -> None:
        """Before a step, or a part of its batch."""

    def loss(self, seen: StepSeen) -> Tensor | None:
        """A term of the step's loss; None for none."""
        return None

    def finish(self, model: nn.Module) -> None:
        """After the last step, before the checkpoint is written and whenever held-out text is run: as the model will be used."""


class Predicted(NamedTuple):
    """What a task makes of a batch: its loss; what the model was given and what it said; again: runs it on the same once more."""

    loss: Tensor
    ids: Tensor
    logits: Tensor
    again: Callable[[], Tensor]


class Examples(NamedTuple):
    """What is learned from where it is no text. train, held [N, n]: an example a row; documents: SHA-256 of what is trained on."""

    train: Tensor
    held: Tensor
    documents: tuple[str, ...]


class TrainingTask(ABC):
    """What is learned. run(**inputs): calls the model, in the types that the recipe says."""

    unit: ClassVar[str]
    """Of the loss."""

    @abstractmethod
    def predict(self, run: Callable[..., Any], batch: Tensor, place: StepPlace) -> Predicted:
        """Of a batch, or a part of it."""

    @abstractmethod
    def judge(self, run: Callable[..., Any], held: Tensor) -> float:
        """The loss on held-out examples: the same draws whenever it is asked."""


class Picturing(TrainingTask):
    """One whose examples are no text."""

    what: ClassVar[str]
    """They are, in the plural."""
    positions: int
    """Of an example, as a layer's tokens."""

    @abstractmethod
    def examples(self) -> Examples:
        """All of them. UsageError where they are not installed."""


class TokenIds(NamedTuple):
    """Of the tokenizer: how many tokens, and the ids of those that begin, end and pad a text."""

    size: int
    bos: int
    eos: int
    pad: int

    def keys(self) -> dict[str, int]:
        """As configurations name them."""
        return {"vocab_size": self.size, "bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


class NoSettings(Form):
    """Of an architecture with nothing to set."""


class Architecture(ABC):
    """One way to build and train a mixture of experts: a class in one file, and a line in `architectures.architectures`."""

    Settings: ClassVar[type[Form]] = NoSettings
    adopts: ClassVar[bool] = False
    """Whether training can begin from a model of another class (`adopt`)."""

    def __init__(self, shape: ShapeForm, settings: Mapping[str, Any] | Form) -> None:
        self.shape = shape
        self.settings: Any = settings if isinstance(settings, Form) else self.Settings.model_validate(dict(settings))

    def task(self) -> Picturing | None:
        """What is learned; None for the next token of a text."""
        return None

    @abstractmethod
    def config(self, vocabulary: TokenIds) -> Any:
        """The transformers configuration of the checkpoint. UsageError for a shape that cannot be."""

    def build(self, config: Any) -> Any:
        """The model, with weights that the training draws anew."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def adopt(self, source: Any, seed: int) -> Any:
        """The model of this architecture that begins with the weights of `source`. UsageError for a source that it cannot be made of."""
        raise NotImplementedError(type(self).__name__)

    def parts(self) -> Sequence[TrainingPart]:
        """What a step does beside the next token's loss, in this order."""
        return ()

    @classmethod
    def example(cls) -> tuple[ShapeForm, dict[str, Any]]:
        """The smallest shape, and settings, with which everything of this architecture happens: for the generic tests."""
        return ShapeForm(hidden=16, layers=2, heads=2, experts=4, width=8, active=2, context=64), {}


def register(config: Any, model: Any) -> None:
    """Have transformers know a class of ours, by its model type. For the end of a file of `architectures`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def routers(model: nn.Module) -> list[nn.Module]:
    """The modules that route, in the order of the layers: those that have a `top_k` and a weight of their own."""
    return [m for m in model.modules() if isinstance(getattr(m, "top_k", None), int) and hasattr(m, "weight")]


def olmoe_keys(shape: ShapeForm, vocabulary: TokenIds) -> dict[str, Any]:
    """The keys that a configuration of OLMoE's kind takes."""
    return {
        **vocabulary.keys(),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.active,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
    }
