"""`moe-prism place`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.placement import PlaceOptions
from .output import emit, table


def place(
    trace: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: PlaceOptions,
    force: bool = False,
    json: bool = False,
) -> None:
    """Say which device shall hold which expert, or which block, and replay what that costs.

    Parameters
    ----------
    trace: Written by `moe-prism trace`; 'nano' is the shipped one.
    out: The JSON file to write: a row per MoE layer with the expert of every slot, device after device, as balancers of engines give it.
    force: Replace an existing file.
    json: One JSON object on stdout.
    """
    from ..files import check_writable
    from ..jobs.place import place_experts

    check_writable(out)
    found = place_experts(trace, out, options, force=force)
    rows = [
        (name, f"{c.straggler:.2f}", f"{c.straggler / c.even:.3f}", f"{c.sends:.2f}", f"{100 * c.at_home:.1f} %")
        for name, c in found.costs.items()
    ]
    text = table(("policy", "slowest device", "of even", "sends/token/layer", "at home"), rows)
    emit({"file": str(out), **found.to_json()}, f"{text}\n{out}: {found.placement.grain} on {options.devices} devices", json)
