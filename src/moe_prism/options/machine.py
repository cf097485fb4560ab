"""Another machine than this one, that a rehearsal sizes work for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..memory import parse_bytes
from ..registry import choices

EXAMPLE = "write it like ram=64GB,cores=32,disk=1TB"
MOST_CORES = 1 << 16


@dataclass(frozen=True)
class OtherMachine:
    """What work may take there: ram and disk in bytes, processor cores of this machine's kind. None: as much as here.

    >>> import moe_prism
    >>> there = moe_prism.OtherMachine.of("ram=64GB,cores=32")
    >>> there.ram, there.cores, there.disk
    (64000000000, 32, None)
    """

    ram: int | None = None
    cores: int | None = None
    disk: int | None = None

    def __post_init__(self) -> None:
        for name in ("ram", "disk"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise UsageError(f"a machine with {name}={size} is impossible", EXAMPLE)
        if self.cores is not None and not 1 <= self.cores <= MOST_CORES:
            raise UsageError(f"a machine with cores={self.cores} is impossible", f"give 1 to {MOST_CORES}")

    @classmethod
    def of(cls, text: str) -> OtherMachine:
        """Of "ram=64GB,cores=32,disk=1TB", any of the three. UsageError for anything else."""
        found: dict[str, int] = {}
        for part in text.split(","):
            name, sign, value = (word.strip() for word in part.partition("="))
            if name not in cls.__dataclass_fields__:
                raise UsageError(f"--for-machine knows no '{name}'", choices(name, cls.__dataclass_fields__))
            if name in found:
                raise UsageError(f"--for-machine names '{name}' twice", EXAMPLE)
            if not sign or not value:
                raise UsageError(f"--for-machine '{part}' is not {name}=SIZE", EXAMPLE)
            found[name] = _count(value) if name == "cores" else parse_bytes(value, name)
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """What is known of it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _count(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"'{text}' is no number of cores", EXAMPLE)
    return int(text[:9])
