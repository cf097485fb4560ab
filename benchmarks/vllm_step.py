"""Time of a decode step of vLLM with the plug-in: full budget against stock vLLM, and lower budgets against full.

    python benchmarks/vllm_step.py [--batches 1,8,32] [--steps 16] [--rounds 3] [--dtype bfloat16] [--layers 8] [--mixed] [--top 4] [--cpu]
                                    [--together .4,.3] [--json]

Needs vLLM's CPU build (docs/how-to/vllm.md).
Whole engine steps on a random-weight OLMoE in which experts dominate (hidden 1024, 64 experts of
512, top-8). Both engines are up at the same time, each in a process of its own, and are asked in turns. A figure is the ratio of the
fastest steps of a round, which other load disturbs least; median over the rounds. `kept` is the share of slots that was really kept.
`--keep FOLDER/elastic` takes what `wide_nano.py` has built instead, whose routing is nano's; `--top 4,2` adds stock engines with fewer
experts per token, and the speed of the budget of equal bytes beside each.
`--together` adds rows that choose their blocks together (rule `batch-blocks`) at these budgets, to full and to rows alone at half.
`--cpu` counts the processor time of one thread, which a busy machine disturbs less than the clock on the wall.
`same/stock` is a second stock engine, asked in the same turns: how far two equal engines are apart is what the other ratios can show.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

E, K, HIDDEN, WIDTH, N_SUB, GATES = 64, 8, 1024, 512, 4, 0
BUDGETS = {"most": 0.75, "half": 0.5, "quarter": 0.25}
PROMPT = 16


def together(budget: float) -> str:
    """The name of a level at which rows choose their blocks together."""
    return f"together-{budget:g}"


def build(folder: Path, layers: int, shared: list[float]) -> None:
    """A random model, a random predictor, and levels that fit both; as `moe-prism refactor` lays them out. shared: of `batch-blocks`."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from moe_prism.checkpoint import OutputFolder, write_manifest
    from moe_prism.elastic import attach
    from moe_prism.point import FULL

    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=E, num_experts_per_tok=K, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, vocab_size=4096, max_position_embeddings=1024,
        eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).to(torch.bfloat16).eval()
    ridges = [torch.randn(E, N_SUB, HIDDEN + N_SUB * GATES + 1) * 0.5 / HIDDEN**0.5 for _ in range(layers)]
    elastic = attach(model, N_SUB, gates=GATES, tensors=[{"ridge": ridge} for ridge in ridges])
    levels = _levels(model, elastic)
    side = {f"layers.{i}.ridge": ridge for i, ridge in enumerate(ridges)} | {
        f"layers.{i}.cutoffs": v for i, v in enumerate(levels)
    }
    with OutputFolder(folder) as out:
        model.save_pretrained(
            out.work, max_shard_size="400MB"
        )  # with an index: vLLM reads every *.safetensors where there is none
        out.save_tensors("prism.safetensors", side)
        # qualities of a random model mean nothing; they only have to rise
        ladder = [{"name": n, "budget": b, "slots": b * K * N_SUB, "quality": b} for n, b in BUDGETS.items()]
        for b in shared:
            point = FULL.with_budget(b, "batch-blocks").to_json()
            ladder.append({"name": together(b), "point": point, "slots": b * K * N_SUB + 0.01, "quality": b + 0.001})
        ladder.sort(key=lambda level: level["slots"])
        out.write_bytes("ladder.json", json.dumps({"levels": ladder}).encode())
        facts = [{"name": f"model.layers.{i}.mlp.experts", "experts": E, "width": WIDTH} for i in range(layers)]
        write_manifest(out, {"kind": "elastic", "n_sub": N_SUB, "gates": GATES, "layers": facts})
        out.finish()


def _levels(model: Any, elastic: Any) -> list[Any]:
    """Quantiles of every layer's slot values on random tokens."""
    import torch

    from moe_prism.elastic.rules.threshold import fit_cutoffs

    levels = []

    def hook(layer: Any) -> Any:
        def run(x: Any, index: Any, weight: Any) -> Any:
            values = (weight.float().abs()[:, :, None] * layer.scorer("ridge")(x, index)).flatten()
            levels.append(fit_cutoffs(values, torch.ones_like(values)))
            return layer.parts.layer.stock(x, index, weight)

        return run

    for layer in elastic.layers:
        layer.parts.layer.install(hook(layer))
    with torch.no_grad():
        model(torch.randint(0, 4096, (8, 32)))
    elastic.detach()
    return levels


@cache
def _prompts(folder: str, batch: int) -> list[list[int]]:
    """Held-out text where the model has a tokenizer, else random tokens."""
    import torch

    if not (Path(folder) / "tokenizer.json").exists():
        return torch.randint(0, 4096, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
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
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument(
        "--mixed", action="store_true", help="also a batch of which half is at a quarter, beside its two halves alone"
    )
    parser.add_argument("--top", help="experts per token of further stock engines")
    parser.add_argument("--alone", action="store_true", help="no second stock engine")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--together", type=lambda text: [float(b) for b in text.split(",")], default=[])
    parser.add_argument("--keep", type=Path, help="build the model here, or use what is there")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if find_spec("vllm") is None:
        return print("skipped: vLLM is not installed here; see docs/how-to/vllm.md", file=sys.stderr)
    if arguments.serve:
        return serve(arguments.serve, arguments.dtype, not arguments.compiled, int(arguments.top), arguments.cpu)
    with tempfile.TemporaryDirectory() as scratch:
        elastic = arguments.keep or Path(scratch) / "elastic"
        if not elastic.exists():
            build(elastic, arguments.layers, arguments.together)
        stock = Path(scratch) / "stock"  # the same files without prism.json: the plug-in leaves it alone
        stock.mkdir()
        for file in elastic.iterdir():
            if not file.name.startswith("prism"):
                copy = shutil.copyfile if file.suffix == ".json" else os.symlink  # we follow no links out of a folder; vLLM does
                copy(file.resolve(), stock / file.name)
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
