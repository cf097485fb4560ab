"""`moe-prism offload`"""

from __future__ import annotations

from pathlib import Path

from .output import emit, note, progress, table


def offload(
    folder: Path,
    /,
    *,
    memory: str,
    target_ms: float | None = None,
    link: str | None = None,
    expert_file: Path | None = None,
    tokens: int = 1280,
    json: bool = False,
) -> None:
    """Say how to run a model whose experts do not fit: budget, policy and precision for this memory, and what a token will cost.

    Measures reads and steps on this machine, and replays the routing of calibration text.

    Parameters
    ----------
    folder: Written by `moe-prism refactor`.
    memory: For experts and their predictors, for example 200MB.
    target_ms: Milliseconds a token may take; the largest budget within it is chosen. Default: no limit.
    link: Bytes per second of what the experts will be read over, for example 500MB, if that is slower than the disk they are on now.
    expert_file: Where the experts are packed, written on first use; default experts.pack in the folder.
    tokens: Of the text that is replayed.
    json: One JSON object on stdout.
    """
    from ..jobs.forecast_offload import plan_offload
    from ..store import parse_bytes

    size = parse_bytes(memory)
    rate = None if link is None else float(parse_bytes(link))
    plan = plan_offload(folder, size, target_ms=target_ms, link=rate, file=expert_file, tokens=tokens, report=progress)
    best = plan.best
    if not plan.met:
        note(f"no way meets {target_ms:g} ms; this is the fastest")
    rows = [
        (f"{w.budget:g}", f"{w.slots:.1f}", w.policy, w.precision, f"{w.hit_rate:.3f}", f"{w.reads_per_token:.1f}", f"{w.ms_per_token:.2f}")
        for w in plan.ways
    ]  # fmt: skip
    text = table(("budget", "slots", "policy", "reads", "hit rate", "reads/token", "ms/token"), rows)
    text += (
        f"\n{plan.slots} of {plan.records} sub-experts fit ({plan.record_bytes} bytes each), reads {plan.bytes_per_second / 1e6:.0f} MB/s"
        f"\nuse --expert-memory {memory} --budget {best.budget:g} --expert-policy {best.policy}: {best.slots:.1f} slots, "
        f"{best.precision} reads, {best.ms_per_token:.2f} ms/token"
    )
    emit(plan.to_json(), text, json)
