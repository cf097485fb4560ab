"""`moe-prism doctor`."""

from __future__ import annotations

from pathlib import Path

from .output import emit


def doctor(model: Path | None = None, /, *, json: bool = False) -> None:
    """Show this machine, the installed libraries, what will work here, and what half a budget buys in time.

    Parameters
    ----------
    model: A folder with a config.json, whose experts are timed beside those of OLMoE and Qwen3. No weights are read.
    json: One JSON object on stdout.
    """
    from ..jobs.doctor import check_machine

    facts = check_machine(model)
    lines = [f"{key:18} {value}" for key, value in facts["machine"].items()]
    lines += [f"{name:18} {version or 'not installed'}" for name, version in facts["libraries"].items()]
    lines += [f"{'ok' if check['ok'] else 'NO':4} {check['what']}" for check in facts["checks"]]
    lines += ["", "time of the experts of one layer to that of stock transformers (float32, one thread)"]
    found = facts["half_budget"]
    lines += [f"{f['shape']:18} {f['tokens']:3} tokens  full budget {f['full']:.2f}, half {f['half']:.2f}" for f in found]
    emit(facts, "\n".join(lines), json)
