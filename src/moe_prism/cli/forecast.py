"""`moe-prism forecast`"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..errors import UsageError
from .output import emit, note, progress, table

if TYPE_CHECKING:
    from ..forecast.speed import SpeedForecast
    from ..forecast.step_time import Machine

PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
QUANTITY = re.compile(r"^\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([numµkKMGTP]?)(B/s|FLOPS|FLOP/s|s)\s*$")


def forecast(
    model: str,
    /,
    *,
    concurrency: str = "1,2,4,8,16,32",
    keep: str = "0.5",
    budgets: str = "0.75,0.5,0.25",
    context: float = 256.0,
    prompt: float = 0.0,
    bandwidth: str | None = None,
    peak: str | None = None,
    fixed: str | None = None,
    bits: float | None = None,
    text: str | None = None,
    tokens: int = 16_384,
    measure: bool = False,
    seconds: float = 45.0,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    json: bool = False,
) -> None:
    """Predict tokens/s with fewer experts per token, fewer experts, or fewer sub-experts, at every concurrency, and say where each pays.

    By default the model is loaded, its routing counted on text, and its decoding steps timed on this machine for a minute. With --bandwidth
    and --peak a forecast needs no weights and no such machine: moe-prism forecast FOLDER --bandwidth 3350GB/s --peak 989TFLOPS --fixed 4ms

    Parameters
    ----------
    model: Folder with config.json and weights, 'nano', or, with --bandwidth and --peak, a config.json alone.
    concurrency: Comma-separated counts of requests that decode together.
    keep: Shares of the experts that pruning leaves; none: ''.
    budgets: Shares of the sub-expert slots, for a model written by `moe-prism refactor`.
    context: Mean tokens that a request attends to.
    prompt: Prompt tokens computed per generated token on the same device; 1 for 1024 in and 1024 out. 0: decoding alone.
    bandwidth: Bytes per second that weights are read with, instead of measuring, like 3350GB/s; of all devices together.
    peak: Arithmetic per second, like 989TFLOPS.
    fixed: Time per step whatever is in it, like 4ms; default with --bandwidth and --peak: 0s.
    bits: Bits per stored weight, if not the config's dtype; needed for quantized models.
    text: Text to count routing on and to time steps on; default stdlib, with --bandwidth and --peak even routing.
    tokens: Tokens to count routing on.
    measure: Time every point that can be run at every concurrency and print it beside the prediction (pruning cannot).
    seconds: About how long to time steps, twice that for a model that is elastic.
    out: Folder for forecast.json, forecast.html and forecast.png.
    json: One JSON object on stdout.
    """
    from ..files import check_writable_folder
    from ..jobs.forecast_speed import SpeedOptions
    from ..jobs.forecast_speed import forecast_speed as run

    check_writable_folder(out)
    options = SpeedOptions(
        concurrency=tuple(int(x) for x in _numbers("--concurrency", concurrency, whole=True)),
        keep=tuple(_numbers("--keep", keep)),
        budgets=tuple(_numbers("--budgets", budgets)),
        context=context,
        prompt=prompt,
        machine=_machine(bandwidth, peak, fixed),
        bits=bits,
        text=text,
        tokens=tokens,
        measure=measure,
        seconds=seconds,
    )
    result = run(model, options, report=progress)
    emit(result.to_json(), show(result), json)
    if out:
        write(result, out)
        note(f"report: {out / 'forecast.html'}")


def _machine(bandwidth: str | None, peak: str | None, fixed: str | None) -> Machine | None:
    """The machine that the options describe; None: measure it."""
    if bandwidth is None and peak is None and fixed is None:
        return None
    if bandwidth is None or peak is None:
        raise UsageError("a machine needs both --bandwidth and --peak", "give both, or neither to measure this machine")
    from ..forecast.step_time import Machine

    return Machine(
        quantity("--bandwidth", bandwidth, ("B/s",)),
        quantity("--peak", peak, ("FLOPS", "FLOP/s")),
        quantity("--fixed", fixed or "0s", ("s",)),
    )


def quantity(option: str, text: str, units: tuple[str, ...]) -> float:
    """ "3350GB/s" -> 3.35e12. UsageError for another unit or no number."""
    found = QUANTITY.match(text)
    try:
        if found and found[3] in units:
            return float(found[1]) * PREFIXES[found[2]]
    except ValueError:
        pass
    example = {"B/s": "3350GB/s", "FLOPS": "989TFLOPS", "s": "4ms"}[units[0]]
    raise UsageError(f"{option} '{text}' is no quantity in {units[0]}", f"write it like {example}")


def _numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    try:
        return [int(part) if whole else float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(
            f"{option} '{text}' is no list of {'counts' if whole else 'numbers'}", "separate them with commas"
        ) from error


def write(result: SpeedForecast, folder: Path) -> None:
    """forecast.json, forecast.html and forecast.png."""
    from ..report.speed import write_forecast

    folder.mkdir(parents=True, exist_ok=True)
    write_forecast(result, folder)


def show(result: SpeedForecast) -> str:
    """Tokens/s by concurrency and point with the ratio to full, what was measured below, and where each kind pays."""
    from ..report.speed_summary import machine_lines, sentences

    rows = []
    for batch in result.concurrencies:
        here = [result.row(batch, name) for name in result.names]
        rows.append([str(batch), *[f"{r.tokens_per_s:.0f} ({r.ratio:.2f}x)" for r in here], here[0].spent_on])
        if any(r.measured_tokens_per_s for r in here):
            rows.append(
                [
                    "",
                    *[
                        f"{r.measured_tokens_per_s:.0f} ({r.measured_ratio or 1:.2f}x)" if r.measured_tokens_per_s else "-"
                        for r in here
                    ],
                    "measured",
                ]
            )
    text = table(["conc.", *result.names, "full: most time in"], rows)
    return "\n".join([*machine_lines(result), "", text, "", *sentences(result)])
