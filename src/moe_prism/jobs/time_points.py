"""The time of a frontier's points: decoding steps on this machine, in a process of its own, the points and stock top-k in turns.

What is timed is a real step: held-out text is fed token by token to sequences with caches. Every turn visits all points, in another
order each time, so that neither a place in the text nor a load that comes and goes belongs to one of them. The first step of a visit is
not counted: it pays for what the point before left in the processor's caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..artefact.open import Opened, open_model
from ..cache_names import made_cache
from ..calibrate.run import input_device
from ..data import token_windows
from ..elastic import Elastic
from ..elastic.bind import Step, bind
from ..elastic.runtime import slots_per_token
from ..errors import PrismError, UsageError
from ..frontier import DecodeTime, Frontier, MeasuredPoint
from ..options.text import source_in
from ..point import OperatingPoint
from ..progress import Report, Update, silent
from .time_steps import Switch, fewer_experts, mean_step

PROMPT, STEPS, LENGTH = 32, 4, 512  # tokens: of the prompt, of a visit, and of a sequence at most
LEAST_TURNS, MOST_TURNS = 5, 25


@dataclass(frozen=True)
class Timing:
    """batch: sequences that decode together; text, text_source: of which the evaluation side is fed, as `TextSource.facts` says it.

    seconds: after which no turn begins.

    >>> import moe_prism
    >>> moe_prism.Timing(batch=8).seconds
    60.0
    """

    batch: int = 1
    text: str = "stdlib"
    text_source: Mapping[str, Any] | None = None
    seconds: float = 60.0


def time_frontier(folder: str | Path, found: Frontier, timing: Timing, *, report: Report = silent) -> Frontier:
    """The same frontier with the time of its points; of those that change weights it has none, since a mask saves nothing.

    Plain top-k is timed as stock: the model's own experts function. So is the full model, in `provenance["time"]["stock"]`.
    Raises UsageError for a batch or a text that cannot be, PrismError where the process does not come back.

    >>> import moe_prism
    >>> found = moe_prism.measure_frontier("elastic", moe_prism.FrontierOptions(tokens=256, length=128))
    >>> timed = moe_prism.time_frontier("elastic", found, moe_prism.Timing(seconds=2))
    >>> timed.points[0].time.ms_per_token > 0
    True
    """
    order = {
        "folder": str(Path(folder).resolve()) if Path(folder).exists() else str(folder),
        "points": [p.point.to_json() if _has_time(p) and p.point else None for p in found.points],
        "stock": [p.budget for p in found.baseline_topk],
        "timing": asdict(timing),
    }
    with report("time") as update:
        answer = _ask(order, update)
    points, stock = ([t and DecodeTime(**t) for t in answer[name]] for name in ("points", "stock"))
    facts = {**answer["facts"], "stock": answer["full"]}
    return replace(
        found,
        points=tuple(replace(p, time=t) for p, t in zip(found.points, points, strict=True)),
        baseline_topk=tuple(replace(p, time=t) for p, t in zip(found.baseline_topk, stock, strict=True)),
        provenance={**found.provenance, "time": facts},
    )


def _has_time(point: MeasuredPoint) -> bool:
    return point.point is not None and point.point.weights is None


def _ask(order: Mapping[str, Any], update: Update) -> dict[str, Any]:
    """Send the order to a process of its own, and hear its progress and its answer, a line each."""
    # what can be imported here can be imported there
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-P", "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:  # noqa: S603
        assert child.stdin is not None and child.stdout is not None
        try:
            with child.stdin as stdin:
                stdin.write(json.dumps(order))
            for line in child.stdout:
                news = json.loads(line)
                if "done" in news:
                    update(news["done"], news["total"])
                elif "error" in news:
                    raise getattr(errors, news["error"])(*news["words"])
                else:
                    answer: dict[str, Any] = news
                    return answer
        except BrokenPipeError:
            pass  # it has died; how, the code says
        finally:
            if child.poll() is None:
                child.kill()
        code = child.wait()
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
    raise PrismError(f"the process that times points {how}", "see whether memory ran out, or leave --time out")


def _main() -> None:
    """The process: reads an order from stdin, answers on stdout; nothing else may write there."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(news: Mapping[str, Any]) -> None:
        print(json.dumps(news), file=answers, flush=True)

    order = json.loads(sys.stdin.read())
    try:
        say(_run(order, lambda done, total: say({"done": done, "total": total})))
    except PrismError as error:
        say({"error": type(error).__name__, "words": [error.cause, error.next_step]})


def _run(order: Mapping[str, Any], update: Update) -> dict[str, Any]:
    timing, opened = Timing(**order["timing"]), open_model(order["folder"])
    elastic = opened.elastic
    k = slots_per_token(elastic) // opened.n_sub
    points = [None if p is None else OperatingPoint.from_json(p) for p in order["points"]]
    counts = [*(max(1, round(k * budget)) for budget in order["stock"]), k]
    switches = [_at(elastic, p) for p in points if p is not None] + [_stock(elastic, n) for n in counts]
    seconds = torch.tensor(list(_turns(opened, switches, timing, update)))
    times = [_summary(own, seconds[:, -1], timing.batch) for own in seconds.T]
    timed = iter(times)
    return {
        "points": [None if p is None else next(timed) for p in points],
        "stock": times[-len(counts) : -1],
        "full": times[-1],
        "facts": {"text": timing.text, "threads": torch.get_num_threads(), "device": _device(opened.model)},
    }


def _at(elastic: Elastic, point: OperatingPoint) -> Switch:
    step = Step(bind(elastic, [point]))
    return lambda: elastic.at(step)


def _stock(elastic: Elastic, chosen: int) -> Switch:
    """The model without us, at its `chosen` heaviest experts per token."""

    @contextmanager
    def switch() -> Iterator[None]:
        try:
            with fewer_experts([layer.parts.layer for layer in elastic.layers], chosen):
                yield
        finally:
            for layer in elastic.layers:
                layer.parts.layer.install(layer)

    return switch


def _turns(opened: Opened, switches: Sequence[Switch], timing: Timing, update: Update) -> Iterator[list[float]]:
    """Seconds per step at every point, a list per turn; the first turn warms up and is not among them."""
    limit = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, limit, PROMPT + STEPS * len(switches))
    wanted = timing.batch * length * (1 + LEAST_TURNS)
    ids = token_windows(opened.tokenizer, source_in(asdict(timing)), "evaluation", length=length, tokens=wanted).ids
    if len(ids) < timing.batch:
        raise UsageError(
            f"text source '{timing.text}' has {len(ids)} held-out sequences of {length} tokens, --time-batch asks for {timing.batch}",
            "give more text or a smaller batch",
        )
    ids, until = ids.to(input_device(opened.model)), 0.0
    for turn in range(1 + MOST_TURNS):
        if turn == 1:
            until = time.monotonic() + timing.seconds
        if turn > LEAST_TURNS and time.monotonic() > until:
            break
        rows = ids[(turn * timing.batch + torch.arange(timing.batch)) % len(ids)]
        order = [(turn * 7 + i) % len(switches) for i in range(len(switches))]
        found = _turn(opened.model, rows, switches, order if turn % 2 else order[::-1])
        update(turn + 1, 1 + MOST_TURNS)
        if turn:
            yield found
    update(1 + MOST_TURNS, 1 + MOST_TURNS)


def _device(model: Any) -> str:
    """The GPU's name, or what torch uses of a CPU, such as "CPU, AVX2"."""
    device = input_device(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"


@torch.no_grad()
def _turn(model: Any, rows: Tensor, switches: Sequence[Switch], order: Sequence[int]) -> list[float]:
    """Visit every point once, going on in the sequences rows [B, length]; where they end, they begin again."""
    found, at, cache = [0.0] * len(switches), rows.shape[1], None
    for i in order:
        if at + STEPS > rows.shape[1]:
            cache, at = made_cache(model(input_ids=rows[:, :PROMPT], use_cache=True, logits_to_keep=1)), PROMPT
        with switches[i]():
            mean_step(model, rows[:, at : at + 1], cache)
            found[i] = mean_step(model, rows[:, at + 1 : at + STEPS], cache)
        at += STEPS
    return found


def _summary(seconds: Tensor, stock: Tensor, batch: int) -> dict[str, Any]:
    """Of seconds per step [turns], beside those of the stock model in the same turns."""
    low, middle, high = (1e3 * float(q) / batch for q in seconds.quantile(torch.tensor([0.25, 0.5, 0.75])))
    return asdict(DecodeTime(batch, middle, low, high, float((seconds / stock).median()), len(seconds)))


if __name__ == "__main__":
    _main()
