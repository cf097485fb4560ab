"""`moe-prism offload fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options.fit import FitOptions
from .output import emit, note, progress, table


def fit(
    trace: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    options: FitOptions,
    force: bool = False,
    json: bool = False,
) -> None:
    """Fit eviction, quotas and reading ahead to recorded routing, for --expert-settings of generate, serve and offload.

    Fits on half of the trace's calibration requests, chooses what takes least time per token on the other half, and reports the
    evaluation side beside lru and the bound belady.

    Parameters
    ----------
    trace: Written by `moe-prism trace`; 'nano' is the shipped one.
    out: The settings to write, for example settings.json; arrays of a predictor go beside it, as .safetensors.
    force: Replace existing settings.
    json: One JSON object on stdout.
    """
    from ..jobs.fit_offload import fit_offload

    found = fit_offload(trace, out, options, force=force, report=progress)
    names = ["lru", "belady (bound)", "fitted", "fitted, nothing ahead"]
    rows = [
        (
            n,
            r.policy,
            r.predictor or "-",
            r.width,
            f"{r.hit_rate:.3f}",
            f"{r.reads_per_token:.1f}",
            f"{r.ms_per_token:.2f}",
            f"{r.deciding_ms:.2f}",
        )
        for n, r in zip(names, found.held_out, strict=False)
    ]
    own = found.settings
    text = table(("evaluation side", "policy", "predictor", "width", "hit rate", "reads/token", "ms/token", "deciding"), rows)
    quotas = "equal parts" if own.quotas is None else f"quotas {', '.join(map(str, own.quotas))}"
    text += "\ndeciding: of ms/token, what a policy without a compiled table and a predictor take on this processor"
    text += f"\n{own.slots} of {len(own.space)} keys fit, {quotas}"
    if not own.width:
        text += "\nreading ahead does not pay at these costs"
    if found.loss is not None:
        t, rate = found.loss.shares, found.loss.rate
        text += f"\nmissing experts by --miss-shares {t.t1:g},{t.t2:g}; on held-out text KL {t.kl:.5f}, "
        text += f"{t.kb_per_token:.0f} kB/token, {t.ms_per_token:.2f} ms/token with nothing read ahead"
        text += f"\nprompts by --prompt-rate {rate.rate:g}; on held-out text KL {rate.kl:.5f}, {rate.kb_per_token:.1f} kB per token of them"
    if found.bits is not None:
        every = [bits for own in found.bits.expert_bits for bits in own]
        text += f"\n{every.count(8)} of {len(every)} experts have 8 bits, the others 4; on held-out text KL {found.bits.kl:.5f}"
    note(f"next: moe-prism generate MODEL --expert-memory SIZE --expert-settings {out}")
    emit({"file": str(out), **found.to_json()}, text, json)
