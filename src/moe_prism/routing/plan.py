"""`plan.json`: at most how many of its experts a token computes in every MoE layer, and the parameters of the policy that chooses them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UsageError
from ..files import replace_file

KIND = "skip plan"
REMAKE = "write it again with `moe-prism skip`"
Numbers = tuple[tuple[float, ...], ...]
"""A parameter: per layer one number, or one per routing rank."""


@dataclass(frozen=True)
class SkipPlan:
    """Data, nothing else: what `plan.json` holds.

    layers: n of every MoE layer, in model order, each at least 1; n equal to the model's k skips nothing. policy: a name of
    `routing_policies`; parameters: its own, per layer. keep_mass: whether what is left of a token's routing weights is scaled up to their
    full sum; None: as the model's router does it (normalised routers scale, others do not). mean: experts per token and layer, by
    count or as fitted. made: how and on what the plan was made, and its measured quality.
    """

    layers: tuple[int, ...]
    policy: str = "top-n"
    parameters: Mapping[str, Numbers] = field(default_factory=dict)
    keep_mass: bool | None = None
    mean: float | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("a skip plan has no layers", "give a number of experts for every MoE layer")
        for layer, n in enumerate(self.layers):
            if n < 1:
                raise UsageError(f"layer {layer} of a skip plan keeps {n} experts", "every layer keeps at least 1")
        for name, rows in self.parameters.items():
            if len(rows) != len(self.layers):
                raise UsageError(f"'{name}' of a skip plan has {len(rows)} layers, not {len(self.layers)}", REMAKE)

    def with_(self, **changes: Any) -> SkipPlan:
        """A copy with some fields replaced."""
        return SkipPlan(**{**self.__dict__, **changes})

    def check(self, layers: int, k: int | None) -> None:
        """UsageError where the plan is for a model with another number of MoE layers or fewer experts per token; k None: not known."""
        if len(self.layers) != layers:
            raise UsageError(f"the skip plan has {len(self.layers)} MoE layers, the model {layers}", "make a plan for this model")
        for layer, n in enumerate(self.layers):
            if k is not None and n > k:
                raise UsageError(
                    f"layer {layer} of the skip plan keeps {n} experts, a token of the model has {k}", f"give 1 to {k}"
                )

    def to_json(self) -> dict[str, Any]:
        """The content of `plan.json`."""
        return {
            "kind": KIND,
            "policy": self.policy,
            "layers": {str(i): n for i, n in enumerate(self.layers)},
            "parameters": {name: [list(row) for row in rows] for name, rows in self.parameters.items()},
            "keep_mass": self.keep_mass,
            "mean": self.mean,
            "made": dict(self.made),
        }

    @classmethod
    def from_json(cls, data: object) -> SkipPlan:
        """The inverse of `to_json`; also takes the bare mapping {layer: n}. Raises CorruptError naming what is wrong."""
        if not isinstance(data, dict):
            raise CorruptError(f"a skip plan must be an object with keys, not {type(data).__name__}", REMAKE)
        if "layers" not in data:
            return cls(_layers(data))
        policy, keep_mass, mean = data.get("policy", "top-n"), data.get("keep_mass"), data.get("mean")
        if not isinstance(policy, str):
            raise CorruptError("'policy' of a skip plan is no name", REMAKE)
        if keep_mass is not None and not isinstance(keep_mass, bool):
            raise CorruptError("'keep_mass' of a skip plan is not true, false or null", REMAKE)
        if mean is not None and not _number(mean):
            raise CorruptError("'mean' of a skip plan is no number", REMAKE)
        made = data.get("made", {})
        parameters = _object(data.get("parameters", {}), "parameters")
        return cls(
            _layers(_object(data["layers"], "layers")),
            policy,
            {name: _rows(rows, name) for name, rows in parameters.items()},
            keep_mass,
            mean,
            _object(made, "made"),
        )

    def save(self, path: str | Path) -> None:
        """Write `plan.json` at once or not at all."""
        data = (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode()
        try:
            replace_file(Path(path), data)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}", "choose a path in an existing, writable folder") from error

    @classmethod
    def load(cls, path: str | Path) -> SkipPlan:
        """Read what `save` or a person wrote. UsageError if there is no such file, CorruptError if it is no skip plan."""
        try:
            data = json.loads(Path(path).read_bytes().decode("utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}", "make a plan with `moe-prism skip`") from error
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{path} is not JSON: {error}", REMAKE) from error
        return cls.from_json(data)


def _layers(mapping: Mapping[str, Any]) -> tuple[int, ...]:
    """n per layer from {"0": n, "1": n, ...}, every layer once."""
    names = [str(i) for i in range(len(mapping))]
    if not mapping or set(mapping) != set(names):
        raise CorruptError("'layers' of a skip plan must name the MoE layers 0, 1, ... one by one", REMAKE)
    for name in names:
        if type(mapping[name]) is not int:
            raise CorruptError(f"layer {name} of a skip plan has no whole number of experts", REMAKE)
    return tuple(mapping[name] for name in names)


def _rows(rows: object, name: str) -> Numbers:
    good = isinstance(rows, list) and all(isinstance(row, list) and row and all(_number(v) for v in row) for row in rows)
    if not good:
        raise CorruptError(f"parameter '{name}' of a skip plan must be a list of numbers per layer", REMAKE)
    assert isinstance(rows, Sequence)
    return tuple(tuple(float(v) for v in row) for row in rows)


def _object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptError(f"'{name}' of a skip plan must be an object with keys", REMAKE)
    return value


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
