"""The contract of a method of decoding: it continues one prompt, by one or several forwards for every token.

It is called through transformers' `custom_generate`, so processors of logits, conditions to stop and streams are transformers' own. What
it sets stands in the `decoding` part of an operating point; the other parts say what a forward of it costs at most.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...elastic.bind import Step, bind, depends_on_batch
from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...point import FULL, Decoding, NamedPoint, OperatingPoint, RoutingStage
from ...registry import choices
from ..base import Method, Subject
from ..steps import ended
from .sequence import Sequence, Spent

Verifier = Callable[[str, str], float]
"""(prompt, what was written behind it) -> how good that is; larger is better."""
Retriever = Callable[[str], str]
"""prompt -> text that is to stand before it."""
LONGEST_AT_ONCE = 1 << 30


@dataclass
class DecodeRun:
    """What is asked of one continuation, with what transformers makes of it.

    point: how a forward of the answer runs, without decoding. shaped(ids [1, t], logits [1, V]) and ended(ids [1, t]) are transformers'
    processors and conditions. heard: is told of every token that is certain. verifier, retriever: for methods that ask one.
    generator: of the random numbers; None: torch's own. chunk: tokens of the prompt that one forward computes at most. adapter: number of
    the fine-tune whose experts answer; -1: none.
    """

    model: Any
    tokenizer: Any
    elastic: Elastic
    point: OperatingPoint
    prompt: list[int]
    shaped: Callable[[Tensor, Tensor], Tensor]
    ended: Callable[[Tensor], bool]
    samples: bool
    heard: Callable[[int], None]
    spent: Spent = field(default_factory=Spent)
    verifier: Verifier | None = None
    retriever: Retriever | None = None
    generator: torch.Generator | None = None
    chunk: int = LONGEST_AT_ONCE
    adapter: int = -1

    def step(self, point: OperatingPoint | None = None) -> Step:
        """Ready to run; None: the request's own point."""
        own = self.point if point is None else point
        bound = bind(self.elastic, [replace(own, weights=None)])  # a change of weights is there already
        return Step(bound, adapter=self.adapter)

    def sequence(self, ids: list[int] | None = None) -> Sequence:
        """A sequence of its own, from the prompt."""
        return Sequence(self.model, self.elastic, list(self.prompt if ids is None else ids), self.spent)

    def draw(self, ids: list[int], logits: Tensor) -> int:
        """The next token behind ids, from logits [V], as plain decoding draws it."""
        scores = self.shaped(torch.tensor([ids], device=logits.device), logits[None])
        if self.samples:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        return int(scores.argmax(-1))

    def read(self, sequence: Sequence, step: Step) -> Generator[None, None, None]:
        """Compute a long prompt in chunks, up to what one forward may hold, and stop behind each for who waits."""
        while len(sequence.ids) - sequence.cached > self.chunk:
            sequence.read(step, self.chunk)
            yield

    def take(self, sequence: Sequence, logits: Tensor, forced: int | None = None) -> int:
        """Add the next token to a sequence, drawn from logits [V] or forced, and tell of it."""
        token = self.draw(sequence.ids, logits) if forced is None else forced
        sequence.ids.append(token)
        self.heard(token)
        return token

    def tokens(self, text: str) -> list[int]:
        """Of a text by itself."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def is_over(self, ids: list[int]) -> bool:
        return self.ended(torch.tensor([ids], device=self.model.device))

    def text(self, ids: Several[int]) -> str:
        """Of tokens, special ones left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True)
class Decoded:
    """tokens: prompt and answer; facts: what the method says of its work, plain JSON values."""

    tokens: list[int]
    facts: dict[str, Any]


Steps = Generator[None, None, Decoded]
"""A continuation in small steps: whoever runs it may do something else between two of them. It returns what it made."""


class DecodeMethod(Method):
    """A way to decode. `neutral`: settings at which it decodes as transformers does, token for token. `sequences`: caches that one
    request holds at once.
    """

    acts = "decoding"
    neutral: ClassVar[Mapping[str, Any]]
    served_by: ClassVar[str] = "generate"
    """Who decodes so, in words for `moe-prism ls methods`."""

    @abstractmethod
    def check(self, elastic: Elastic, point: OperatingPoint) -> None:
        """UsageError where this model or the other parts of a point do not go with it."""

    @property
    def sequences(self) -> int:
        return 1

    @property
    def asks_verifier(self) -> bool:
        """Whether it cannot work without one."""
        return False

    @abstractmethod
    def steps(self, request: DecodeRun) -> Steps:
        """Continue the prompt, and stop behind every token or earlier. Runs without gradients."""

    def decode(self, request: DecodeRun) -> Decoded:
        """Continue the prompt to its end."""
        return ended(self.steps(request))

    def part(self) -> Decoding:
        """As it stands in an operating point."""
        return Decoding(method=self.name.partition(":")[0], settings=asdict(self.parameters))

    def points(self, subject: Subject) -> Several[NamedPoint]:
        """One: the model itself, decoded so."""
        return [NamedPoint(name=self.name, point=OperatingPoint(decoding=self.part()))]


def plain(request: DecodeRun) -> Steps:
    """One forward for each token, as transformers decodes."""
    own, sequence = request.step(), request.sequence()
    yield from request.read(sequence, own)
    while True:
        request.take(sequence, sequence.forward(own)[-1])
        if request.is_over(sequence.ids):
            return Decoded(sequence.ids, {"forwards": request.spent.forwards})
        yield


def read_settings(kind: type[DecodeMethod], name: str, settings: Mapping[str, Any]) -> DecodeMethod:
    """The method that the JSON of a point says. UsageError for a setting that it does not have, or of another type."""
    known = {f.name: str(f.type) for f in fields(kind.Parameters)}
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"decoding method '{name}' has no setting '{key}'", choices(key, known))
        wanted = known[key]
        legal = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[wanted]
        if not isinstance(value, legal) or (isinstance(value, bool) and wanted != "bool"):
            raise UsageError(f"'{key}' of decoding method '{name}' is no {wanted}: {value!r:.40}", "see docs/how-to/decode.md")
    typed = {key: float(value) if known[key] == "float" else value for key, value in settings.items()}
    return kind(name, kind.Parameters(**typed))


def refuse_held(elastic: Elastic, point: OperatingPoint, name: str) -> None:
    """UsageError for a point at which a token's experts depend on more than the text before it."""
    if depends_on_batch(point):
        raise UsageError(
            f"'{name}' computes tokens together, and what one gets at this point depends on the others", "use another point"
        )
    if bind(elastic, [point]).holds:
        raise UsageError(
            f"'{name}' computes tokens that it may take back, and this budget is held over those of the request",
            "give the point control 'none'",
        )


def at_budget(elastic: Elastic, point: OperatingPoint, budget: float) -> OperatingPoint:
    """The same with less: a share of the slots' bytes, each token for itself; whole experts where there are no sub-experts."""
    if budget >= 1:
        return point
    if elastic.layers[0].parts.n_sub > 1:
        return replace(point, slots=FULL.with_budget(budget, "threshold", "none").slots)
    k = elastic.k or 1
    stage = RoutingStage(layers=(max(1, round(budget * k)),) * len(elastic.layers), keep_mass=elastic.normalises())
    return replace(point, routing=(*point.routing, stage))
