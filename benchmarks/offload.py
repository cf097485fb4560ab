"""What a model costs whose experts are on disk: ms per decoded token of the store against LRU over whole experts, at equal memory.

    python benchmarks/offload.py [--folder ELASTIC] [--share 0.25] [--tokens 96] [--rounds 3] [--link MB/s] [--only lru,mixed] [--json]
    python benchmarks/offload.py --large           # a random model of 400 MB of experts: timing only
    python benchmarks/offload.py --overlap         # step time against the larger of reading and computing

Every configuration decodes the same held-out text token by token (teacher forcing, so that all do equal work) and adds one thing to the
one before it; they take turns, window by window. Memory is `share` of the expert weights, predictors included. Reads go past the page
cache. KL is against the model in memory on the same tokens. --link slows reads down to a bandwidth, to see a slower disk than the one at
hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from link import Link

from moe_prism.artefact.load import load, side_tensors
from moe_prism.artefact.open import open_model
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import LayerStream, read_manifest
from moe_prism.cli.output import note
from moe_prism.data import token_windows
from moe_prism.elastic import operating_point
from moe_prism.jobs.frontier import subject_of
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.methods.find import method
from moe_prism.methods.slots.bits import BitsMethod
from moe_prism.model import find_layers
from moe_prism.offload.cache import cache_policies
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint, SlotBits, SlotRule
from moe_prism.store import ExpertStore, StoreOptions, open_pack
from moe_prism.store.aio_reader import open_reader
from moe_prism.store.choose_misses import Misses
from moe_prism.store.outputs import SlotOutputs
from moe_prism.store.plane_layout import PlaneStorage
from moe_prism.store.pools import Eviction

PROMPT = 32
LARGE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
    "num_experts": 32, "num_experts_per_tok": 4, "max_position_embeddings": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One line of the ablation. budget: operating point, of the rule `bits` where records are planes; the rest goes to the store."""

    name: str
    budget: float = 1.0
    parts: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    planes: bool = False

    def point(self, bits: SlotBits | None) -> OperatingPoint:
        if not self.planes or self.budget >= 1:
            return FULL.with_budget(self.budget)
        assert bits is not None
        return OperatingPoint(slots=SlotRule(rule="bits", budget=self.budget, bits=bits))


def ablation(args: argparse.Namespace) -> list[Config]:
    """Each adds one thing to the line before it."""
    floor = Misses(args.floor)
    lru, policy = {"policy": "lru"}, {"policy": args.policy}
    ahead = {**policy, "ahead": args.ahead}
    return [
        Config("lru", parts=1, options=lru),
        Config("packing", options=lru),
        Config("finer-k", args.budget, options=lru),
        Config("policy", args.budget, options=policy),
        Config("prefetch", args.budget, options=ahead),
        Config("aware", args.wide, options={**policy, "misses": floor}),
        Config("aware+prefetch", args.wide, options={**ahead, "misses": floor}),
        Config("mixed", args.wide, options={**policy, "misses": Misses(args.exact, low=args.floor)}),
        Config("mixed+prefetch", args.wide, options={**ahead, "misses": Misses(args.exact, low=args.floor)}),
        Config("planes, all bits", options=policy, planes=True),
        *(Config(f"planes, {bits:g}", bits, options=policy, planes=True) for bits in args.bits),
        Config(f"planes, {args.bits[0]:g}, ahead", args.bits[0], options=ahead, planes=True),
    ]


def fitted(folder: Path, group: int, layers: int | None) -> SlotBits:
    """What a width loses, measured on calibration text; layers: of a random model, whose time does not depend on it: a quarter per bit."""
    if layers is not None:
        widths = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
        errors = (tuple(0.15 * 4.0 ** (2 - w) for w in widths),) * layers
        return SlotBits(widths=widths, errors=errors, group=group, choosing=4.0)
    whole = open_model(folder)
    options = FrontierOptions(text="domains", calibration_tokens=4096, length=256)
    found = method(f"bits:group={group}")
    assert isinstance(found, BitsMethod)
    return found.fitted(subject_of(whole, options))


@dataclass
class Run:
    """A configuration and what it has shown: seconds of every decode step, KL of every token."""

    config: Config
    model: Any
    point: OperatingPoint
    seconds: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    bytes: int = 0
    waited: float = 0.0
    hits: int = 0
    requested: int = 0

    def row(self, base: Run | None = None) -> dict[str, Any]:
        ms = statistics.fmean(self.seconds) * 1e3
        return {
            "config": self.config.name,
            "ms_per_token": ms,
            "ratio": ms / (statistics.fmean(base.seconds) * 1e3) if base else 1.0,
            "kl": statistics.fmean(self.kl) if self.kl else None,
            "hit_rate": self.hits / max(1, self.requested),
            "kb_per_token": self.bytes / len(self.seconds) / 1e3,
            "waited_ms": self.waited / len(self.seconds) * 1e3,
            "slots": self.model._moe_prism.store.slots if hasattr(self.model._moe_prism, "store") else None,
        }


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, point: OperatingPoint, count: int) -> tuple[list[float], torch.Tensor]:
    """Prefill PROMPT tokens, then `count` steps: their seconds, and the log-probabilities [count, V]."""
    seconds, found = [], []
    with operating_point(model, point=point):
        out = model(input_ids=ids[:, :PROMPT], use_cache=True)
        for i in range(PROMPT, PROMPT + count):
            began = time.perf_counter()
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - began)
            found.append(out.logits[0, -1].float().log_softmax(-1))
    return seconds, torch.stack(found)


def turn(run: Run, ids: torch.Tensor, count: int, reference: torch.Tensor | None) -> None:
    """One window of one configuration."""
    store = run.model._moe_prism.store
    store.times.reset()
    before = store.cache.counts + type(store.cache.counts)()
    seconds, found = decode(run.model, ids, run.point, count)
    after = store.cache.counts
    run.seconds += seconds
    run.bytes += store.times.bytes
    run.waited += store.times.waited
    run.hits += after.hits - before.hits
    run.requested += after.requested - before.requested
    if reference is not None:
        run.kl += (reference.exp() * (reference - found)).sum(-1).tolist()


def ours(args: argparse.Namespace, folder: Path, work: Path, quality: bool) -> list[dict[str, Any]]:
    whole, tokenizer = load(folder)
    windows = held_out(folder, tokenizer, args)
    memory = int(args.share * expert_bytes(folder, whole))
    reference = [decode(whole, row[None], FULL, args.tokens) for row in windows] if quality else None
    in_memory = statistics.fmean(s for seconds, _ in reference for s in seconds) * 1e3 if reference else None
    del whole
    configs = [c for c in ablation(args) if not args.only or any(c.name.startswith(name) for name in args.only.split(","))]
    random = LARGE["num_hidden_layers"] if args.large else None
    bits = fitted(folder, args.group, random) if any(c.planes and c.budget < 1 for c in configs) else None
    runs = [Run(config, stored(folder, work, memory, config, args), config.point(bits)) for config in configs]
    for run in runs:  # compile, fill the cache
        decode(run.model, windows[-1:], run.point, 16)
        note(f"{run.config.name}: warm")
    for number, row in enumerate(windows):
        order = runs if number % 2 == 0 else runs[::-1]
        for run in order:
            turn(run, row[None], args.tokens, reference[number][1] if reference else None)
        note(f"window {number + 1}/{len(windows)}")
    found = [run.row(runs[0]) for run in runs]
    return [{"config": "in memory", "ms_per_token": in_memory, "memory": None}, *found] if in_memory else found


def overlap(args: argparse.Namespace, folder: Path, work: Path) -> list[dict[str, Any]]:
    """One layer streamed for T tokens: reading alone (outputs are zeros), computing alone (everything resident), and both.

    work: processor time of the computing thread while it only reads. That can hide behind nothing, so no order of things is faster than
    the larger of reading and computing + work; `over_bound` is the time over that.
    """
    manifest = read_manifest(folder)
    pack_for(folder, work / "parts", low=not args.large)
    pack = open_pack(work / "parts", manifest)
    layers = find_layers(LayerStream(folder).model)
    count = pack.space.experts * pack.space.parts
    policy = Eviction(cache_policies.get("lru"))
    small = pack.space.layers * max(8, count // 8)
    both, reading = (kind(pack, small, layers[0], policy) for kind in (ExpertStore, Reading))
    whole = ExpertStore(pack, len(pack.space), layers[0], policy)
    found = []
    for tokens in (1, 16, 64, 128, 256, 512):
        x = torch.randn(tokens, pack.layout.hidden)
        index = torch.rand(tokens, pack.space.experts).topk(min(4, pack.space.experts)).indices
        weight, keep = torch.rand(index.shape), torch.ones(*index.shape, pack.space.parts, dtype=torch.bool)
        seconds: dict[str, list[float]] = {"both": [], "read": [], "compute": [], "work": []}
        for turn_ in range(args.rounds * 4 + 1):
            for name, store in (("both", both), ("read", reading), ("compute", whole)):
                began, own = time.perf_counter(), time.thread_time()
                for layer in range(pack.space.layers):
                    store.run(layer, x, store.wanted(layer, index, weight, keep))
                if turn_:
                    seconds[name].append(time.perf_counter() - began)
                if turn_ and name == "read":
                    seconds["work"].append(time.thread_time() - own)
        ms = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        over = ms["both"] / max(ms["read"], ms["compute"] + ms["work"])
        found.append({"tokens": tokens, **ms, "ratio": ms["both"] / max(ms["read"], ms["compute"]), "over_bound": over})
    return found


class NoOutputs(SlotOutputs):
    """Computes nothing."""

    def compute(self, x: torch.Tensor, row: Any, weight: Any, slot: Any) -> Any:
        return np.zeros((len(row), x.shape[1]), np.float32)


class Reading(ExpertStore):
    """Reads and computes nothing."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._outputs = NoOutputs(self.arena, self.places, self.times)


def stored(folder: Path, work: Path, memory: int, config: Config, args: argparse.Namespace) -> Any:
    """The model over a store of `memory` bytes, its packed file in `work`."""
    name = "experts" if config.parts == 1 else "planes" if config.planes else "parts"
    options = dict(config.options)
    if config.planes:
        pack_for(folder, work / name, planes=PlaneStorage(group=args.group))
    elif config.parts is None:
        options.setdefault("misses", Misses())
        pack_for(folder, work / name, low=not args.large or args.low)
    else:
        memory += predictors(folder)  # whole experts need none
    if args.link:
        options["reader"] = lambda pack, arena: Link(open_reader(pack, arena), args.link)
    return load(folder, store=StoreOptions(memory, work / name, parts=config.parts, **options))[0]


def predictors(folder: Path) -> int:
    """Bytes that selection keeps resident, in float32."""
    return sum(4 * t.numel() for own in side_tensors(folder, len(read_manifest(folder)["layers"])) for t in own.values())


def pack_for(folder: Path, path: Path, **form: Any) -> None:
    from moe_prism.store import write_pack

    if not path.exists():
        write_pack(folder, path, read_manifest(folder), **form)


def expert_bytes(folder: Path, model: Any) -> int:
    layers = [layer.parts.layer for layer in model._moe_prism.layers]
    return sum(e.num_experts * e.parameters_per_expert() for e in layers) * int(read_manifest(folder)["bytes_per_weight"])


def held_out(folder: Path, tokenizer: Any, args: argparse.Namespace) -> torch.Tensor:
    exclude = read_manifest(folder)["calibration"]["documents"]
    length = PROMPT + args.tokens
    return token_windows(tokenizer, args.text, "evaluation", length=length, tokens=length * args.rounds, exclude=exclude).ids


def elastic(args: argparse.Namespace, work: Path) -> Path:
    """The elastic model to run: one that is given, prism-nano without gate neurons, or a random one."""
    if args.folder:
        return Path(args.folder)
    if not args.large:
        refactor("nano", work / "nano", RefactorOptions(gates=0))
        return work / "nano"
    source = work / "source"
    random_model(source)
    tiny = CalibrateOptions(text="stdlib", tokens=2048, length=256, reservoir=256)
    refactor(source, work / "large", RefactorOptions(gates=0, solver="random", profile_tokens=0, calibration=tiny))
    return work / "large"


def random_model(folder: Path) -> None:
    """OLMoE with prism-nano's vocabulary and 128 experts of 3.1 MB. Embeddings and routers are scaled so that tokens spread over them."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    from moe_prism.model.named import NANO

    nano = json.loads((NANO / "config.json").read_text())
    special = {key: nano[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", **{**LARGE, **special})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "mlp.gate.weight")):
                parameter.mul_(50 if "embed" in name else 10)
    model.save_pretrained(folder)
    for file in NANO.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cells = [f"{row['config']:16}", f"{row['ms_per_token']:8.2f} ms/token"]
        if "ratio" in row:
            cells += [f"{row['ratio']:.3f}x", f"hits {row['hit_rate']:.3f}", f"{row['kb_per_token']:8.0f} kB/token"]
            cells += [f"waited {row['waited_ms']:6.2f} ms", f"{row['slots']} slots"]
            cells += [f"KL {row['kl']:.5f}"] if row["kl"] is not None else []
        print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="an elastic model, instead of refactoring prism-nano")
    parser.add_argument("--work", help="folder for packed files, default a temporary one")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--low", action="store_true", help="int8 records for the large model too")
    parser.add_argument("--text", default="stdlib", help="its evaluation side is decoded")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link", type=float, default=0.0, help="MB/s, default the disk's own")
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--ahead", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.75, help="of the lines without cache-aware selection")
    parser.add_argument("--wide", type=float, default=0.9, help="budget for resident slots")
    parser.add_argument("--floor", type=float, default=0.65, help="budget for missing slots")
    parser.add_argument(
        "--exact", type=float, default=0.05, help="budget for missing slots that are read as they are, the others int8"
    )
    parser.add_argument(
        "--bits", type=float, nargs="+", default=[0.27, 0.2], help="budgets of the rule `bits`, from records of planes"
    )
    parser.add_argument("--group", type=int, default=32, help="weights of planes that share a scale")
    parser.add_argument("--only", help="comma-separated configurations")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = Path(args.work or temporary)
        folder = elastic(args, work)
        rows = overlap(args, folder, work) if args.overlap else ours(args, folder, work, quality=not args.large)
    if args.json:
        json.dump({"benchmark": "offload", "arguments": vars(args), "rows": rows}, sys.stdout)
    elif args.overlap:
        for row in rows:
            print(
                "  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
            )
    else:
        show(rows)


if __name__ == "__main__":
    main()
