"""`moe-prism forecast`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ..options.speed import SpeedOptions
from .output import emit, note, progress, table

if TYPE_CHECKING:
    from ..forecast.speed import SpeedForecast


def forecast(
    model: str,
    /,
    *,
    options: SpeedOptions,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    json: bool = False,
) -> None:
    """Predict tokens/s with fewer experts per token, fewer experts, or fewer sub-experts, at every concurrency, and say where each pays.

    By default the model is loaded, its routing counted on text, and its decoding steps timed on this machine for a minute. With --bandwidth
    and --peak a forecast needs no weights and no such machine: moe-prism forecast FOLDER --bandwidth 3350GB/s --peak 989TFLOPS --fixed 4ms

    Parameters
    ----------
    model: Folder with config.json and weights, 'nano', 'nano-mix', or, with --bandwidth and --peak, a config.json alone.
    out: Folder for forecast.json, forecast.html and forecast.png.
    json: One JSON object on stdout.
    """
    from ..files import check_writable_folder
    from ..jobs.forecast_speed import forecast_speed

    check_writable_folder(out)
    result = forecast_speed(model, options, report=progress)
    emit(result.to_json(), show(result), json)
    if out:
        write(result, out)
        note(f"report: {out / 'forecast.html'}")


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
