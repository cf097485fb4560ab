"""Several changes of weights, each on what the one before it left, as one change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..model import MoELayer
from ..point import WeightChange
from ..schema import check
from ..schema.points import REMAKE, ChainForm
from .changes import Change, change_of
from .edit import Edit
from .prune.choice import KeptExperts
from .quantize.decoded import encodings_move, weights_state

WHERE = "settings of the weight change 'chain'"
_NAME = "_moe_prism_chains"
_T = TypeVar("_T")


@dataclass(frozen=True)
class ChainChange(Edit):
    """parts: in the order in which they are made. Experts and neurons keep their numbers throughout."""

    parts: tuple[Change, ...]
    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        kinds = [change.name for change in self.parts]
        if sum(kind in ("quantize", "bands", "smooth", "subspace", "sparse") for kind in kinds) > 1:
            raise UsageError("two edits of a chain say how experts are stored", "leave one of them out")
        if sum(kind in ("merge", "rehome", "subspace") for kind in kinds) > 1:
            raise UsageError("two edits of a chain merge experts", "leave one of them out")
        for before, after in pairwise(kinds):
            if before in ("quantize", "bands", "smooth"):
                raise UsageError(f"'{after}' would change experts that are stored in fewer bits", "make fewer bits the last edit")
        merging = next((i for i, kind in enumerate(kinds) if kind in ("merge", "rehome", "subspace")), 0)
        if "slice" in kinds[:merging]:
            raise UsageError("neurons that are not there cannot be merged", "merge experts first, then remove neurons")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ChainChange:
        return cls(tuple(change_of(WeightChange.of_form(row)) for row in check(ChainForm, settings, WHERE, REMAKE).edits))

    def settings(self) -> dict[str, Any]:
        return {"edits": [change.part().to_json() for change in self.parts]}

    @cached_property
    def _key(self) -> tuple[str, ...]:
        """Of every change and those before it, a name."""
        texts = [json.dumps(change.part().to_json(), sort_keys=True) for change in self.parts]
        return tuple(sha256("\n".join(texts[: number + 1]).encode()).hexdigest() for number in range(len(texts)))

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        return self._installed(model, layers)

    @contextmanager
    def _installed(self, model: Any, layers: Sequence[MoELayer]) -> Iterator[None]:
        """What was encoded inside before is there again, where the weights outside are those of then."""
        known: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = model.__dict__.setdefault(_NAME, {})
        outside, inside = weights_state(layers), dict[str, tuple[int, ...]]()

        def remember(key: str) -> None:
            inside[key] = weights_state(layers)

        try:
            with ExitStack() as stack:
                for key, change in zip(self._key, self.parts, strict=True):
                    stack.enter_context(change.installed(model, layers))
                    if key in known and known[key][0] == outside:
                        encodings_move(model, known[key][1], weights_state(layers))
                    stack.callback(remember, key)
                yield
        finally:
            now = weights_state(layers)
            known.update({key: (now, state) for key, state in inside.items()})

    @property
    def resident_share(self) -> float:
        """As if edits took their shares of each other; what a model's own take, prices say."""
        found = 1.0
        for change in self.parts:
            found *= change.resident_share
        return found

    @property
    def resident_values(self) -> int:
        return sum(change.resident_values for change in self.parts)

    def bytes_per_weight(self, layers: Sequence[MoELayer], layer: int, stored: float) -> Tensor | None:
        return _first(change.bytes_per_weight(layers, layer, stored) for change in self.parts)

    def neurons_there(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        found = [own for change in self.parts if (own := change.neurons_there(layers, layer)) is not None]
        return torch.stack(found).all(0) if found else None

    def same_weights(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        return _first(change.same_weights(layers, layer) for change in self.parts)

    def experts_there(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        found = [own for change in self.parts if (own := change.experts_there(layers, layer)) is not None]
        return torch.stack(found).all(0) if found else None

    # as one edit, where every change is one

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        for edit in self._edits():
            edit.check_fits(layers)

    def changes(self, number: int) -> bool:
        return any(edit.changes(number) for edit in self._edits())

    def edit(self, number: int, layer: MoELayer) -> None:
        for edit in self._edits():
            if edit.changes(number):
                edit.edit(number, layer)

    @property
    def staying(self) -> tuple[KeptExperts, ...] | None:
        return _first(change.staying for change in self.parts if isinstance(change, Edit))

    def _edits(self) -> list[Edit]:
        found = [change for change in self.parts if isinstance(change, Edit)]
        if len(found) < len(self.parts):
            raise UsageError("an edit of the chain has no form in files of its own", "write them one after the other (--recipe)")
        return found


def _first(found: Iterable[_T | None]) -> _T | None:
    """The first that is anything."""
    return next((one for one in found if one is not None), None)
