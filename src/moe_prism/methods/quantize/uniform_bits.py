"""A codec as a method: every expert at the same width, one point per width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ...compress.codec import Codec, codecs
from ...compress.quantize import QuantizeChange
from ...errors import UsageError
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject

STANDING = ("int8", 8), ("int4", 4)
"""The rows of every frontier beside plain top-k: `rtn` in the codec's first group."""


@dataclass(frozen=True, kw_only=True)
class CodecParameters:
    """bits: one width, 0: all of the codec's. group: inputs that share a scale, 0: the codec's own. symmetric: of `rtn` and `nested`."""

    bits: float = 0
    group: int = 0
    symmetric: bool = True


class UniformBits(Method):
    """`rtn:4`, or with more settings `rtn:bits=4:group=128:symmetric=false`. Name is that of a codec.

    What falls is bytes, those that are read and those in memory alike; slots stay as they are.
    """

    acts = "weights"
    Parameters = CodecParameters
    parameters: CodecParameters

    @classmethod
    def written(cls, name: str) -> str:
        return f"{name}:BITS" if len(codecs.get(name).widths) > 1 else name

    @classmethod
    def set_by(cls, name: str, parameter: str) -> str:
        return f"CODEC:{parameter}={parameter.upper()}"

    @classmethod
    def example(cls) -> str | None:
        return None

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked, codec = self.parameters, self.codec()
        group = asked.group or codec.groups[0]
        widths = (asked.bits,) if asked.bits else codec.legal
        return [NamedPoint(name=self._name(bits), point=stored_at(codec, bits, group)) for bits in widths]

    def codec(self) -> Codec:
        """Of the name, with the parameters. UsageError for one that it does not have."""
        kind = codecs.get(self.name.partition(":")[0])
        known = {f.name for f in fields(kind)}
        if not self.parameters.symmetric and "symmetric" not in known:
            raise UsageError(f"codec '{kind.name}' has no setting 'symmetric'", "leave it out")
        return kind(symmetric=self.parameters.symmetric) if "symmetric" in known else kind()  # type: ignore[call-arg]

    def _name(self, bits: float) -> str:
        """rtn-4, or with what was set beside the bits rtn-4-group-128."""
        plain = self.name.partition(":")[0]
        more = [f"-group-{self.parameters.group}"] if self.parameters.group else []
        return f"{plain}-{bits:g}{''.join(more)}{'' if self.parameters.symmetric else '-asymmetric'}"


def stored_at(codec: Codec, bits: float, group: int) -> OperatingPoint:
    """The point at which every expert is stored by a codec."""
    return OperatingPoint(weights=QuantizeChange(codec, float(bits), group).part())


def standing_rows(subject: Subject) -> list[NamedPoint]:
    """What people do today, without us: int8 and int4, where the source is not already that small."""
    codec = codecs.get("rtn")()
    layers = [layer.parts.layer for layer in subject.elastic.layers]
    stored = subject.elastic.stored_bytes_per_weight
    rows = []
    for name, bits in STANDING:
        change = QuantizeChange(codec, float(bits), codec.groups[0])
        if float(change.bytes_per_weight(layers, 0, stored).mean()) < stored:
            rows.append(NamedPoint(name=name, point=OperatingPoint(weights=change.part())))
    return rows
