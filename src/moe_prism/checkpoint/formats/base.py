"""The contract of a source format: which tensors on disk make one weight, and what they mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import UsageError
from ..shards import Source
from .matrix import CodedMatrix

NEXT = "use the unquantized release, or dequantize it with the tool that wrote it"


@dataclass(frozen=True)
class StoredWeight:
    """One weight of the model and the tensors on disk that hold it.

    parts: role -> name on disk, the codes first. shape: of the weight as the model has it. transposed: the model has it [.., i, o].
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    transposed: bool = False


class SourceFormat(ABC):
    """A way to store quantized weights, made from config.json's `quantization_config`. UsageError for a variant that is not read."""

    name: ClassVar[str]
    beside: ClassVar[tuple[str, ...]] = ()
    """Last parts of the names of tensors that say how activations are quantized: no weights, and left out with their format."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @abstractmethod
    def weights(self, source: Source) -> dict[str, StoredWeight]:
        """The quantized weights of a checkpoint by the names that the model has for them."""

    @abstractmethod
    def matrix(self, parts: Mapping[str, Tensor]) -> CodedMatrix:
        """The tensors of one weight, by role, as what they mean. UsageError if they do not fit each other."""

    @abstractmethod
    def tensors(self, matrix: CodedMatrix, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse: what of `parts` changes, by role, for codes, scales and zeros of `matrix`; same types and shapes as in `parts`."""

    def refuse(self, what: str) -> UsageError:
        """The error for a variant of this format that is not read."""
        return UsageError(f"{self.name} with {what} is not read", NEXT)


def gather(source: Source, codes: str, roles: Mapping[str, str], optional: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """stem -> {role: name} of the tensors called `<stem><codes>` whose siblings are there too.

    roles: role -> last part of the name, those of `optional` may be missing. A tensor that has no required sibling is no quantized one.
    """
    names, found = set(source.names()), {}
    for name in source.names():
        if name.endswith(codes):
            stem = name.removesuffix(codes)
            parts = {"codes": name} | {role: stem + end for role, end in roles.items() if stem + end in names}
            if set(roles) - set(parts) <= set(optional):
                found[stem] = parts
    return found
