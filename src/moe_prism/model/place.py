"""Where models are loaded to, for everything inside a block; a command's --dtype, --device and --device-map."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

import torch

from ..errors import UsageError
from ..options.place import Placement

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONG = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_VARIABLES = {
    f.name: f"MOE_PRISM_{f.name.upper()}" for f in fields(Placement)
}  # so that processes which a command starts know it too


@contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Inside, and in processes started there, models that run are loaded there. UsageError for a device that this machine has not."""
    placement.check()
    if placement.device is not None:
        check_device(placement.device)
    before = {name: os.environ[name] for name in _VARIABLES.values() if name in os.environ}
    given = {_VARIABLES[f.name]: getattr(placement, f.name) for f in fields(placement)}
    os.environ.update({name: value for name, value in given.items() if value is not None})
    try:
        yield
    finally:
        for name in _VARIABLES.values():
            os.environ.pop(name, None)
        os.environ.update(before)


def placement() -> Placement:
    """What the innermost `placed` says; all None outside."""
    return Placement(**{name: os.environ.get(variable) or None for name, variable in _VARIABLES.items()})  # type: ignore[arg-type]


def recorded(options: Any) -> dict[str, Any]:
    """For a manifest: a job's options, and where it ran if that was asked for, since it can change the last digits of a result."""
    asked = {name: value for name, value in vars(placement()).items() if value is not None}
    return {**asdict(options), **({"placement": asked} if asked else {})}


def compute_type() -> torch.dtype | str | None:
    """The asked type; "auto" for the stored one, None where nothing was asked."""
    name = placement().dtype
    return name if name in (None, "auto") else TYPES[_LONG.get(str(name), str(name))]


def check_device(name: str) -> torch.device:
    """The device. UsageError for one that torch or this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device '{name}' is none that torch knows", "give cpu, cuda or cuda:1") from error
    if device.type == "cpu":
        return device
    known = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if known is not None else 0
    if known is None or known.type != device.type or (device.index or 0) >= count:
        has = f"cpu, {known.type} 0 to {count - 1}" if known is not None and count else "cpu alone"
        raise UsageError(f"--device '{name}' is not on this machine", f"it has {has}")
    return device


def stays_on_cpu(flag: str, *, types: bool = False) -> None:
    """UsageError where another place was asked for, beside a flag with which a model computes on the CPU. types: in any type."""
    asked = placement()
    name = "--device" if (asked.device or "cpu") != "cpu" else "--device-map" if asked.device_map else ""
    if not name and not types and compute_type() not in (None, torch.float32):
        name = "--dtype"
    if name:
        raise UsageError(
            f"{flag} computes on the CPU{'' if types else ' in float32'}, and {name} says otherwise", f"leave {name} out"
        )
