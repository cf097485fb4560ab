"""Fit what a store is run with to a trace: `moe-prism offload fit`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..cores import processor
from ..errors import UsageError
from ..files import check_writable
from ..offload.cache import cache_policies
from ..offload.keys import KeySpace
from ..offload.predict import predictors
from ..offload.settings import DECIDING, ExpertSettings, write_settings
from ..offload.trace import Trace, load_trace
from ..options.fit import FitOptions
from ..progress import Report, silent
from ..result import Result
from ..store.fit import Costs, FitWay, StoreFit, search
from ..store.price_reads import Forecast
from .fit_bits import BitsFit, fit_bits
from .fit_shares import LossFit, SharesPrices, fit_shares


@dataclass(frozen=True)
class FitRow:
    """A way to run. quotas: what they follow from, `misses` or `need`, empty for equal parts.

    hit_rate: of what layers asked for; reads_per_token: records, on demand and ahead; ms_per_token: forecast.

    deciding_ms: of those, what a policy without a compiled table and a predictor take themselves, as measured on this machine.
    """

    policy: str
    quotas: str
    predictor: str
    width: int
    hit_rate: float
    reads_per_token: float
    ms_per_token: float
    deciding_ms: float

    @classmethod
    def of(cls, way: FitWay, time: Forecast) -> FitRow:
        """Of a way and its time."""
        predictor = way.predictor if way.predictor is not None and way.width else ""
        times = 1e3 * time.seconds, 1e3 * time.deciding
        return cls(way.policy, way.quotas_by, predictor, way.width, time.hit_rate, time.reads, *times)


@dataclass(frozen=True)
class OffloadFit(Result):
    """What was chosen; `tried` on the choosing half of the calibration side, `held_out` on the evaluation side: `lru`, `belady`, chosen.

    Where the chosen way reads ahead, `held_out` has it without that as a fourth row. loss: what is read in a smaller form, bits: what
    experts have in planes, None where that was not asked for.
    """

    settings: ExpertSettings
    share: float
    tried: list[FitRow]
    held_out: list[FitRow]
    loss: LossFit | None = None
    bits: BitsFit | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the arrays."""
        own = self.settings
        chosen = {"policy": own.policy, "quotas": own.quotas, "predictor": own.predictor, "width": own.width}
        return {
            **asdict(own.space),
            "slots": own.slots,
            "share": self.share,
            **chosen,
            "tried": [asdict(row) for row in self.tried],
            "held_out": [asdict(row) for row in self.held_out],
            **({name.name: None for name in fields(LossFit)} if self.loss is None else asdict(self.loss)),
            "bits": None if self.bits is None else asdict(self.bits),
        }

    def to_records(self) -> list[dict[str, Any]]:
        """A row per way on the evaluation side."""
        return [asdict(row) for row in self.held_out]


def fit_offload(
    trace: str | Path | Trace,
    out: str | Path | None = None,
    options: FitOptions | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> OffloadFit:
    """Fit policy, quotas, predictor and its width to a trace; written to `out`, as `--expert-settings` reads it.

    Everything is fitted on half of the requests of the calibration side and chosen on the other half. The evaluation side is for the
    report alone. Raises UsageError for an unknown name, a policy that knows the future, or a trace that has no such parts.

    >>> import moe_prism
    >>> asked = moe_prism.FitOptions(policy=["lru", "lfu"], predictor=["frequency"], parts=1)
    >>> found = moe_prism.fit_offload("nano", "settings.json", asked)
    >>> [row["policy"] for row in found.to_records()][:2]
    ['lru', 'belady']
    """
    options = options or FitOptions()
    options.check()
    if out is not None:
        check_writable(Path(out))
        if Path(out).exists() and not force:
            raise UsageError(f"'{out}' exists", "choose another path, or --force")
    policies = options.policy or [n for n in cache_policies.names() if not cache_policies.get(n).needs_future]
    foreseeing = [name for name in policies if cache_policies.get(name).needs_future]
    if foreseeing:
        raise UsageError(f"'{foreseeing[0]}' knows the future: it is a bound for replays", "leave it out of --policy")
    guesses = options.predictor or predictors.names()
    for name in guesses:
        predictors.get(name)
    rows = trace if isinstance(trace, Trace) else load_trace(trace)
    space = _space(rows, options)
    for name in options.predictor:
        if predictors.get(name).needs_inputs and rows.inputs is None:
            raise UsageError(f"'{name}' needs router inputs, which the trace lacks", "record it with `moe-prism trace --inputs`")
    slots = max(1, round(options.share * len(space)))
    fit = StoreFit(rows, space, slots, Costs(*(1e-3 * ms for ms in _prices(options))))
    done, total = 0, len(policies) + len(guesses)
    with report("fit") as update:

        def told() -> None:
            nonlocal done
            done += 1
            update(done, total)

        way, tried = search(fit, policies, guesses, bool(options.predictor), told)
    held_out = _judged(fit, way)
    made: dict[str, Any] = {
        "model": str(rows.header.get("model", "")),
        "options": {**asdict(options), "folder": None if options.folder is None else options.folder.name},
        "held_out": [asdict(row) for row in held_out],
        DECIDING: {"processor": processor(), "ms": held_out[2].deciding_ms},
    }
    arrays = way.guess.arrays() if way.guess is not None and way.guess.needs_fit else {}
    settings = ExpertSettings(space, slots, way.policy, way.settings, way.quotas, way.predictor, way.width, arrays, made)
    loss: LossFit | None = None
    bits: BitsFit | None = None
    if options.folder is not None and options.max_kl is not None and options.planes:
        bits = fit_bits(options.folder, options.max_kl, report)
        if [len(own) for own in bits.expert_bits] != [space.experts] * space.layers:
            raise UsageError(
                f"the trace is of another model than '{options.folder}'", "give the folder that it was recorded with"
            )
        made["bits"] = {"bound": bits.bound, "kl": bits.kl}
        settings = replace(settings, expert_bits=bits.expert_bits)
    elif options.folder is not None and options.max_kl is not None:
        prices = SharesPrices(space.layers * options.layer_ms + held_out[-1].deciding_ms, options.record_ms)
        loss = fit_shares(options.folder, settings, float(rows.header.get("budget", 1.0)), prices, options.max_kl)
        made |= {"shares": asdict(loss.shares), "rate": asdict(loss.rate)}
        settings = replace(settings, shares=(loss.shares.t1, loss.shares.t2), prompt_rate=loss.rate.rate)
    if out is not None:
        write_settings(Path(out), settings)
    return OffloadFit(settings, options.share, [FitRow.of(*pair) for pair in tried], held_out, loss, bits)


def _prices(options: FitOptions) -> tuple[float, ...]:
    """Milliseconds, as `Costs` has seconds."""
    return options.layer_ms, options.record_ms, options.busy_ms, options.uncompiled_ms, options.guess_ms, options.first_ms


def _judged(fit: StoreFit, way: FitWay) -> list[FitRow]:
    """The evaluation side, which chooses nothing."""
    bare = FitWay(way.policy, way.settings, way.quotas, way.quotas_by)
    ways = [FitWay("lru", {}), FitWay("belady", {}), way, *([bare] if way.width else [])]
    return [FitRow.of(each, fit.time(each, fit.judging)) for each in ways]


def _space(trace: Trace, options: FitOptions) -> KeySpace:
    parts = trace.n_sub if options.parts is None else options.parts
    if parts not in (1, trace.n_sub):
        raise UsageError(f"the trace has {trace.n_sub} sub-experts per expert, not {parts}", "leave --parts out, or give 1")
    return KeySpace(trace.layers, trace.experts, parts)
