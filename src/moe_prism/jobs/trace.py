"""Record routing traces, and say what caches of all sizes would make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..artefact.load import load
from ..artefact.open import sub_experts
from ..checkpoint.companions import origin
from ..data import token_windows
from ..data.splits import Side
from ..elastic import operating_point
from ..errors import UsageError
from ..model import find_layers, load_to_run, load_tokenizer, resolve
from ..offload.answers import RoutedShape, read_answers
from ..offload.cache import cache_policies
from ..offload.consistency import routing_report
from ..offload.predict.reuse import ReusePredictor
from ..offload.record import TraceRecorder, record
from ..offload.replay import ReplayOptions, groups, replay
from ..offload.trace import Trace, load_trace
from ..options.text import text_source
from ..options.trace import TraceOptions
from ..progress import Report, silent
from ..result import Findings
from .inspect import inspect_model
from .rehearsal import begin
from .resources import model_tree, needed_by_running
from .which_text import with_text


def record_trace(
    model: str | Path,
    out: str | Path | None,
    options: TraceOptions | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> Trace:
    """Run text through a model or an elastic folder and keep its routing; written to `out` unless that is None.

    Raises UsageError for a bad option, a model without MoE layers, or an existing `out`.

    >>> import moe_prism
    >>> found = moe_prism.record_trace("nano", "trace.npz", moe_prism.TraceOptions(tokens=512, length=128))
    >>> found.to_json()["tokens"], found.to_json()["slots_per_token"]
    (512, 4.0)
    """
    options = options or TraceOptions()
    options.check()
    if out is not None and Path(out).exists() and not force:
        raise UsageError(f"'{out}' exists", "choose another path, or --force")
    if options.answers is not None:
        answered = answered_trace(model, options.answers)
        if out is not None:
            answered.save(out)
        return answered
    where = resolve(model)
    tree, cut = model_tree(where), sub_experts(where)
    if cut == 1 and options.budget != 1.0:
        raise UsageError(f"'{model}' is not elastic, so it has no budget {options.budget:g}", "run `moe-prism refactor` first")
    find_layers(tree, dense=False)
    tokenizer = load_tokenizer(where)
    limit = int(getattr(tree.config.get_text_config(), "max_position_embeddings", None) or options.length)
    length = min(options.length, limit)
    options = with_text(options, model)
    source = text_source(options.text, options.text_field)
    windows = [
        (side, token_windows(tokenizer, source, side, length=length, tokens=max(length, options.tokens // 2)).ids)
        for side in get_args(Side)
    ]
    begin(needed_by_running(tree, rows=length, cut=cut))
    loaded = load(where)[0] if cut > 1 else load_to_run(where)
    header = {"model": origin(where), "text": options.text, "budget": options.budget, "options": asdict(options)}
    with report("trace") as update:
        if hasattr(loaded, "_moe_prism"):
            with operating_point(loaded, options.budget, rule=options.rule):
                trace = _record(loaded, windows, options, header, update)
        else:
            trace = _record(loaded, windows, options, header, update)
    if out is not None:
        trace.save(out)
    return trace


def answered_trace(model: str | Path, answers: Path) -> Trace:
    """The routing that answers of vLLM or SGLang tell, one answer per line, of a model that is at hand: its weights are not read.

    Raises UsageError or CorruptError for a file that holds no routing of this model.
    """
    facts = inspect_model(model)
    moe = [number for number, row in enumerate(facts["layers"]) if row["kind"] == "moe"]
    experts = {facts["layers"][number]["experts"] for number in moe}
    if len(experts) != 1 or not facts["experts_per_token"]:
        raise UsageError(f"'{model}' has no MoE layers of one size", "give the model that answered")
    shape = RoutedShape(len(facts["layers"]), moe, experts.pop(), facts["experts_per_token"])
    return read_answers(answers, shape, origin(resolve(model)))


def _record(loaded: Any, windows: Any, options: TraceOptions, header: dict[str, Any], update: Any) -> Trace:
    recorder = TraceRecorder(loaded, values=options.values, inputs=options.inputs)
    return record(recorder, windows, prompt=options.prompt, header=header, progress=update)


def inspect_routing(model: str | Path, trace: str | Path | None = None, *, report: Report = silent) -> Findings:
    """SRP, SCH and hit rates of a model's routing: from a trace file (`nano` is the shipped one), else from 4,096 tokens run now.

    >>> import moe_prism
    >>> sorted(moe_prism.inspect_routing("nano", trace="nano"))[:3]
    ['experts', 'hit_rates', 'k']
    """
    if trace is None:
        return Findings(routing_report(record_trace(model, None, TraceOptions(tokens=4096), report=report)), "hit_rates")
    found, experts = load_trace(trace), [row["experts"] for row in inspect_model(model)["layers"] if row["kind"] == "moe"]
    if experts != [found.experts] * found.layers:
        raise UsageError(
            f"trace '{trace}' has {found.layers} layers of {found.experts} experts, '{model}' has not",
            "record a trace of this model",
        )
    return Findings(routing_report(found), "hit_rates")


def compare_policies(
    trace: Trace,
    sizes: Sequence[int],
    *,
    sub_experts: bool = False,
    shared: bool = False,
    policies: Sequence[str] | None = None,
    report: Report = silent,
) -> list[dict[str, Any]]:
    """Hit rates of policies on the decode rows of a trace's evaluation side, fitted on its calibration side.

    sizes: slots per layer, in experts or sub-experts. One row per (policy, size): policy, slots, hit_rate, of_belady (its hits over
    Belady's), loads per token (misses). `reuse` gets its hints where the trace has router inputs.
    """
    fitting, rows = trace.part("calibration").decode(), trace.part("evaluation").decode()
    space = trace.sub_space if sub_experts else trace.space
    work = list(groups(rows, space))
    hints = ReusePredictor.fit(fitting, space).scores(rows) if trace.inputs is not None else None
    names = ["belady", *(n for n in policies or cache_policies.names() if n != "belady")]
    found: list[dict[str, Any]] = []
    with report("replay") as update:
        for done, size in enumerate(sizes):
            best = 0
            for name in names:
                policy = cache_policies.get(name)
                counts = replay(
                    rows,
                    policy,
                    size,
                    ReplayOptions(
                        space=space,
                        shared=shared,
                        hints=hints if name == "reuse" else None,
                        settings=policy.fit(fitting, space, size),
                        order=work,
                    ),
                )
                best = best or counts.hits
                found.append(
                    {
                        "policy": name,
                        "slots": size,
                        "hit_rate": counts.hit_rate,
                        "of_belady": counts.hits / best if best else 1.0,
                        "loads_per_token": counts.misses / len(rows),
                        "bound": policy.needs_future,
                    }
                )
            update(done + 1, len(sizes))
    return found


def write_miss_curves(trace: str | Path, out: str | Path, *, report: Report = silent) -> None:
    """A page with the miss curves of all policies on a trace, for whole experts and, where it has them, for sub-experts."""
    from ..report.misses import write_misses

    found = load_trace(trace)
    parts = [("Whole experts", compare_policies(found, miss_sizes(found.k, found.experts), report=report))]
    if found.n_sub > 1:
        needed = max(1, round(float(found.slots().mean())))
        sizes = miss_sizes(needed, found.experts * found.n_sub)
        parts.append(("Sub-experts", compare_policies(found, sizes, sub_experts=True, report=report)))
    facts = {
        "model": found.header.get("model", "a model"),
        "tokens": len(found.part("evaluation").decode()),
        **{name: getattr(found, name) for name in ("k", "experts", "layers")},
    }
    write_misses(out, facts, parts, shares(found))


def shares(trace: Trace) -> list[list[float]]:
    """[L][E]: of a layer's choices, the share of each expert."""
    counts = np.zeros((trace.layers, trace.experts))
    for row in trace.to_records():
        counts[row["layer"], row["expert"]] = row["tokens"]
    return (counts / np.maximum(1, counts.sum(1, keepdims=True))).tolist()  # type: ignore[no-any-return]


def miss_sizes(k: int, keys: int) -> list[int]:
    """Slots per layer worth a look: 1, 1.5, 2, 3 and 4 times what a token needs, below everything."""
    return sorted({min(keys, max(1, round(rho * k))) for rho in (1, 1.5, 2, 3, 4)})
