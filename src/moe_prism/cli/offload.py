"""`moe-prism offload`."""

from __future__ import annotations

from pathlib import Path

from ..memory import parse_bytes
from ..options.offload import OffloadOptions
from .output import emit, note, progress, table


def offload(folder: Path, /, *, memory: str, options: OffloadOptions, json: bool = False) -> None:
    """Say how to run a model whose experts do not fit: budget, policy and precision for this memory, and what a token will cost.

    Measures reads and steps on this machine, and replays the routing of calibration text.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`.
    memory: For experts and their predictors, for example 200MB.
    json: One JSON object on stdout.
    """
    room = parse_bytes(memory)
    from ..jobs.forecast_offload import forecast_offload

    forecast = forecast_offload(folder, room, options, report=progress)
    best = forecast.best
    if not forecast.met:
        note(f"no way meets {options.target_ms:g} ms; this is the fastest")
    rows = [
        (
            w.point or f"{w.budget:g}",
            f"{w.slots:.1f}",
            w.policy,
            w.precision,
            w.ahead,
            *_figures(w.hit_rate, w.reads_per_token, w.ms_per_token),
        )
        for w in forecast.ways
    ]
    text = table(("budget", "slots", "policy", "reads", "ahead", "hit rate", "reads/token", "ms/token"), rows)
    at = f"--point {best.point}" if best.point else f"--budget {best.budget:g}"
    how = f" --expert-policy {best.policy}"
    if options.expert_parts is not None:
        how = f" --expert-parts {options.expert_parts}{how}"
    if options.expert_settings is not None:
        how = f" --expert-settings {options.expert_settings}{how} --expert-ahead {best.ahead}"
    elif best.ahead:
        how += f" --expert-ahead {best.ahead}"
    text += (
        f"\n{forecast.slots} of {forecast.records} sub-experts fit ({forecast.record_bytes} bytes each), "
        f"reads {forecast.bytes_per_second / 1e6:.0f} MB/s"
        f"\nfor `moe-prism offload fit`: --layer-ms {forecast.layer_ms:.3g} --record-ms {forecast.record_ms:.3g} "
        f"--first-ms {forecast.first_ms:.2g} --busy-ms {forecast.busy_ms:.2g} "
        f"--uncompiled-ms {forecast.uncompiled_ms:.2g} --guess-ms {forecast.guess_ms:.2g}"
        f"\nuse --expert-memory {memory} {at}{how}: {best.slots:.1f} slots, "
        f"{best.precision} reads, {best.ms_per_token:.2f} ms/token"
    )
    emit(forecast.to_json(), text, json)


def _figures(hit_rate: float, reads: float, ms: float) -> tuple[str, str, str]:
    return f"{hit_rate:.3f}", f"{reads:.1f}", f"{ms:.2f}"
