"""Time of a decode step of vLLM with the plug-in: full budget against stock vLLM, and lower budgets against full.

    python benchmarks/vllm_step.py FOLDER/elastic [--batches 1,8,32] [--steps 16] [--rounds 3] [--dtype bfloat16] [--mixed] [--top 4]
                                    [--together .4,.3] [--cpu] [--json]

Needs vLLM's CPU build (docs/how-to/vllm.md), and FOLDER, which `wide_nano.py` builds: OLMoE's shape, where experts dominate, with nano's
routing. Both engines are up at the same time, each in a process of its own, and are asked in turns. A figure is the ratio of the
fastest steps of a round, which other load disturbs least; median over the rounds. `kept` is the share of slots that was really kept.
`--top 4,2` adds stock engines with fewer experts per token, and the speed of the budget of equal bytes beside each.
`--together` adds rows that choose their blocks together (rule `batch-blocks`) at these budgets, to full and to rows alone at half.
`--cpu` counts the processor time of one thread, which a busy machine disturbs less than the clock on the wall.
`same/stock` is a second stock engine, asked in the same turns: how far two equal engines are apart is what the other ratios can show.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

K, N_SUB = 8, 4  # of the models of `wide_nano.py`
BUDGETS = {"most": 0.75, "half": 0.5, "quarter": 0.25}
PROMPT = 16


def together(budget: float) -> str:
    """The name of a level at which rows choose their blocks together."""
    return f"together-{budget:g}"


def lay_out(source: Path, scratch: Path, shared: list[float]) -> tuple[Path, Path]:
    """(the model as vLLM alone sees it, the elastic one with our levels), without a copy of the weights. shared: of `batch-blocks`."""
    from moe_prism.point import FULL

    slots = K * N_SUB
    # the levels are timed: their qualities only have to rise
    ladder = [{"name": n, "budget": b, "slots": b * slots, "quality": b} for n, b in BUDGETS.items()]
    for b in shared:
        point = FULL.with_budget(b, "batch-blocks").to_json()
        ladder.append({"name": together(b), "point": point, "slots": b * slots + 0.01, "quality": b + 0.001})
    ladder.sort(key=lambda level: level["slots"])
    stock, elastic = scratch / "stock", scratch / "elastic"
    for folder in (stock, elastic):
        folder.mkdir()
        for file in source.iterdir():
            if (
                file.is_file()
                and file.name not in ("ladder.json", "frontier.json")
                and (folder is elastic or "prism" not in file.name)
            ):
                os.link(file, folder / file.name)
    (elastic / "ladder.json").write_text(json.dumps({"levels": ladder}))
    return stock, elastic


@cache
def _prompts(folder: str, batch: int) -> list[list[int]]:
    """Held-out text."""
    from moe_prism.data import token_windows
    from moe_prism.model import load_tokenizer

    ids = token_windows(load_tokenizer(folder), "stdlib", "evaluation", length=PROMPT, tokens=PROMPT * batch).ids
    return ids.tolist()


def serve(folder: str, dtype: str, eager: bool, top: int, cpu: bool) -> None:
    """The child: answers lines {"batch", "steps", "qualities"} with the seconds of the fastest decode step."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    clock = time.thread_time if cpu else time.perf_counter
    if cpu:
        os.environ["OMP_NUM_THREADS"] = "1"
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        dtype=dtype,
        enforce_eager=eager,
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        hf_overrides={"num_experts_per_tok": top},
    ).llm_engine
    from moe_prism.serve.vllm import layer  # not before the engine: see worker.py

    kept: list[float] = []
    run = layer.Packed.run

    def counted(packed: Any, x: Any, index: Any, weight: Any, settled: Any) -> Any:
        kept.append(float(settled.keep.float().mean()))
        return run(packed, x, index, weight, settled)

    print("ready", file=reply, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        prompts = _prompts(folder, order["batch"])
        for i, prompt in enumerate(prompts):
            quality = order["qualities"][i % len(order["qualities"])]
            extra = None if quality == "full" else {"quality": quality}
            params = SamplingParams(
                temperature=0, max_tokens=order["steps"] + 2, ignore_eos=True, extra_args=extra, detokenize=False
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        engine.step()
        seconds = []
        kept.clear()
        while engine.has_unfinished_requests():
            layer.Packed.run = counted if len(seconds) == 1 else run  # one step is counted, and not used
            began = clock()
            engine.step()
            seconds.append(clock() - began)
        print(
            json.dumps([min(seconds[2 : order["steps"]]), statistics.mean(kept) if kept else 1.0]),
            file=reply,
            flush=True,
        )


class Child:
    """An engine in a process of its own."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, top: int = K) -> None:
        command = [sys.executable, __file__, "--serve", str(folder), "--dtype", arguments.dtype, "--top", str(top)]
        command += [flag for flag, on in (("--compiled", arguments.compiled), ("--cpu", arguments.cpu)) if on]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the engine died; its output is above")
        return line

    def ask(self, batch: int, steps: int, qualities: list[str]) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"batch": batch, "steps": steps, "qualities": qualities}) + "\n")
        self.process.stdin.flush()
        seconds, kept = json.loads(self.line())
        return seconds, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument(
        "--mixed", action="store_true", help="also a batch of which half is at a quarter, beside its two halves alone"
    )
    parser.add_argument("--top", help="experts per token of further stock engines")
    parser.add_argument("--alone", action="store_true", help="no second stock engine")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--together", type=lambda text: [float(b) for b in text.split(",")], default=[])
    parser.add_argument("folder", type=Path, nargs="?", help="the elastic folder that wide_nano.py has built")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if find_spec("vllm") is None:
        return print("skipped: vLLM is not installed here; see docs/how-to/vllm.md", file=sys.stderr)
    if arguments.serve:
        return serve(arguments.serve, arguments.dtype, not arguments.compiled, int(arguments.top), arguments.cpu)
    if arguments.folder is None:
        parser.error("give the elastic folder that wide_nano.py has built")
    with tempfile.TemporaryDirectory(dir=arguments.folder.parent) as scratch:  # beside it, for links
        stock, elastic = lay_out(arguments.folder, Path(scratch), arguments.together)
        names = ("stock", "elastic") if arguments.alone else ("stock", "elastic", "same")
        children = {name: Child(elastic if name == "elastic" else stock, arguments) for name in names}
        children |= {
            f"top-{n}": Child(stock, arguments, n) for n in map(int, (arguments.top or "").split(",") if arguments.top else ())
        }
        try:
            report(arguments, children)
        finally:
            for child in children.values():
                child.process.kill()


def report(arguments: argparse.Namespace, children: dict[str, Child]) -> None:
    for child in children.values():
        child.line()
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        runs = {name: (name, batch, ["full"]) for name in children if name != "elastic"} | {
            q: ("elastic", batch, [q]) for q in ("full", *BUDGETS, *map(together, arguments.together))
        }
        if arguments.mixed and batch > 1:
            runs |= {"mixed": ("elastic", batch, ["quarter", "full"])}
            runs |= {"half full": ("elastic", batch // 2, ["full"]), "half quarter": ("elastic", batch // 2, ["quarter"])}
        found: dict[str, list[float]] = {name: [] for name in runs}
        kept = {}
        for turn in range(arguments.rounds + 1):
            for name, (child, count, qualities) in runs.items():
                seconds, kept[name] = children[child].ask(count, arguments.steps, qualities)
                if turn:
                    found[name].append(seconds)
        rows.append(_row(batch, found, kept))
        if not arguments.json:
            print("  ".join(f"{key} {value:g}" for key, value in rows[-1].items()), flush=True)
    if arguments.json:
        print(json.dumps(rows))


def _row(batch: int, found: dict[str, list[float]], kept: dict[str, float]) -> dict[str, float]:
    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(found[a], found[b], strict=True)), 3)

    row = {
        "batch": batch,
        "stock_ms": round(1e3 * statistics.median(found["stock"]), 1),
        **({"same/stock": ratio("same", "stock")} if "same" in found else {}),
        "full/stock": ratio("full", "stock"),
    }
    for name, budget in BUDGETS.items():
        row |= {f"{budget:g}/full": ratio(name, "full"), f"kept@{budget:g}": round(kept[name], 3)}
    for name, budget in BUDGETS.items():
        if (plain := f"top-{round(budget * K)}") in found:
            row |= {f"{plain}/stock": ratio(plain, "stock"), f"{budget:g}/{plain}": ratio(name, plain)}
    for name in found:
        if name.startswith("together"):
            row |= {
                f"{name}/full": ratio(name, "full"),
                f"{name}/half": ratio(name, "half"),
                f"kept@{name}": round(kept[name], 3),
            }
    if "mixed" in found:
        found["two steps"] = [a + b for a, b in zip(found["half full"], found["half quarter"], strict=True)]
        row |= {"mixed/full": ratio("mixed", "full"), "mixed/two_steps": ratio("mixed", "two steps")}
    return row


if __name__ == "__main__":
    main()
