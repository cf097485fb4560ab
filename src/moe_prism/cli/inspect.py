"""`moe-prism inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from .output import emit, note, progress, table

SHOWN = 4  # names of unread tensors


def inspect(
    model: str, /, *, routing: bool = False, trace: str | None = None, report: Path | None = None, json: bool = False
) -> None:
    """Show the MoE layers of a model, its bytes, and how its experts can be split. Reads headers, not weights.

    Parameters
    ----------
    model: Folder with config.json and safetensors, a .gguf file, 'nano' or 'nano-mix'.
    routing: Also how steady its routing is (SRP, SCH) and what caches of its experts would hit. Runs 4,096 tokens.
    trace: With --routing: a file written by `moe-prism trace`, or 'nano' for the shipped one, instead of running the model.
    report: With --trace: write a page with the miss curves of all cache policies here; takes some minutes.
    json: One JSON object on stdout.
    """
    from ..files import check_writable
    from ..jobs.inspect import inspect_model

    check_writable(report)
    if not routing and (trace or report):
        raise UsageError("--trace and --report belong to --routing", "add --routing")
    if report and not trace:
        raise UsageError("--report needs a recorded trace", "run `moe-prism trace` and add --trace FILE")
    facts = inspect_model(model)
    share = facts["expert_parameters"] / facts["parameters"]
    head = (
        f"{facts['model']}: {facts['architecture']} ({facts['family']}), {facts['parameters'] / 1e6:.2f} M parameters, "
        f"{share:.0%} in experts, {_stored(facts)}, {facts['bytes_on_disk'] / 2**20:.1f} MiB on disk\n"
        f"experts per token: {facts['experts_per_token'] or 'unknown'}; {_next(facts)}\n"
    )
    constant = any(row["constants"] for row in facts["layers"])
    columns = ("name", "kind", "experts", *(("constants",) if constant else ()), "hidden", "width", "gated", "biases")
    text = head + table(columns, [[row[c] for c in columns] for row in facts["layers"]])
    text += _unread(facts["unread_tensors"])
    if routing:
        from ..jobs.trace import inspect_routing

        facts["routing"] = inspect_routing(model, trace, report=progress)
        text += "\n\n" + show_routing(facts["routing"])
    if report and trace:
        _write(report, trace)
    emit(facts, text, json)


def _stored(facts: dict[str, Any]) -> str:
    return f"{facts['quantized']} ({facts['dtype']} when dequantized)" if facts["quantized"] else str(facts["dtype"])


def _unread(names: list[str]) -> str:
    """Tensors on disk that no parameter reads; --json has them all."""
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    what = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"\n{what} that this model does not read: {', '.join(names[:SHOWN])}{more}"


def _next(facts: dict[str, Any]) -> str:
    """What a reader does with this model."""
    if facts["n_sub"] is None and any(row["constants"] for row in facts["layers"]):
        return "constants stand for experts; next: `moe-prism frontier`, or generate"
    if facts["n_sub"] is None:
        return f"--n-sub can be {facts['sub_experts']}"
    return f"elastic already, {facts['n_sub']} sub-experts each; next: `moe-prism frontier {facts['model']}`, or generate, serve"


def show_routing(facts: dict[str, Any]) -> str:
    """SRP, hit rates and load as tables."""
    srp = table(
        ("segment", "SRP", "active experts"),
        [(row["m"], f"{row['score']:.1%}", f"{row['size'] * facts['k']:.1f}") for row in facts["srp"]],
    )
    names = [name for name in facts["hit_rates"][0] if name != "slots"]
    rates = table(
        ("slots per layer", *names),
        [(row["slots"], *[f"{row[name]:.1%}" for name in names]) for row in facts["hit_rates"]],
    )
    load = table(
        ("layer", "load entropy", "busiest expert"),
        [(i, f"{row['entropy']:.3f}", f"{row['busiest']:.1%}") for i, row in enumerate(facts["load"])],
    )
    return f"routing of {facts['tokens']} decoded tokens\n{srp}\n\nhit rates\n{rates}\n\n{load}"


def _write(report: Path, trace: str) -> None:
    from ..jobs.trace import write_miss_curves

    write_miss_curves(trace, report, report=progress)
    note(f"report: {report}")
