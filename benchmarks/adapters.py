"""Adapters of one base model, trained, packed and run together in one batch (ExpertWeave, ESFT, ComPEFT).

    python benchmarks/adapters.py [--domains prose,headers,web] [--share 0.5] [--steps 60] [--seeds 1] [--first-seed 0]
                                  [--pack 0.2,0.05] [--tokens 4096] [--turns 40] [--json]

For each domain the experts of `nano` that hold --share of its routing weight in each layer are trained by next-token loss on the domain's
calibration side; router, attention and every other expert stay. `moe-prism adapter` keeps what changed, whole and packed. Loss: mean NLL
on the domain's evaluation side, and how much less than the base's it is, with a 95 % interval (bootstrap over windows). All adapters run
in one batch; `same` says whether each row's logits are those of that adapter alone, to the bit, and whether its most likely tokens are
those of the merged checkpoint. `time` is a forward with one and with three adapters among its tokens, as a ratio to the base's in the
same turn (base, one, three, base, ...): the median of the turns with its 95 % interval. The base has no room for adapters there, and
`room` is the base that has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bootstrap import interval
from printed import printed
from torch import Tensor

from moe_prism.adapters.choose import choose_experts
from moe_prism.adapters.table import fragmentation
from moe_prism.artefact.open import open_model
from moe_prism.calibrate.run import Pass, Settings
from moe_prism.data import token_windows
from moe_prism.jobs.adapter import make_adapter, with_adapters
from moe_prism.model import find_layers, load_model, load_tokenizer
from moe_prism.model.named import NANO
from moe_prism.options.adapter import AdapterOptions

LENGTH, BATCH, RATE = 128, 8, 3e-4
TOGETHER = 2  # windows of each domain in the mixed batch


def losses(model: Any, ids: Tensor) -> np.ndarray:
    """Mean NLL of each window."""
    found = []
    with torch.no_grad():
        for part in ids.split(BATCH):
            logits = model(input_ids=part).logits[:, :-1].float()
            flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            found.append(flat.view(len(part), -1).mean(1).numpy())
    return np.concatenate(found)


def chosen(ids: Tensor, share: float) -> list[list[int]]:
    model = load_model(NANO).float().eval()
    calibration = Pass(model, find_layers(model), Settings(collectors=("counts",)))
    calibration.run(ids)
    return choose_experts([own["counts"].state() for own in calibration.collectors], share)


def train(ids: Tensor, experts: list[list[int]], steps: int, seed: int) -> Any:
    """nano with these experts trained: gradients of all others are zero, and so is what Adam makes of them."""
    model = load_model(NANO).float().eval()
    layers = find_layers(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    owners = []
    for layer, own in zip(layers, experts, strict=True):
        mask = torch.zeros(layer.num_experts, 1, 1)
        mask[own] = 1
        for parameter in layer.module.parameters():
            parameter.requires_grad_(True).register_hook(lambda g, mask=mask: g * mask)
            owners.append(parameter)
    optimiser = torch.optim.AdamW(owners, lr=RATE, weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = ids[torch.randint(len(ids), (BATCH,), generator=g)]
        optimiser.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimiser.step()
    return model


def together(folders: dict[str, Path], tuned: dict[str, Path], held: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """All adapters and the base in one batch, against each alone and against each merged checkpoint."""
    opened = open_model(NANO)
    names = list(folders)
    ids = torch.cat([held[name][:TOGETHER] for name in names] + [held[names[0]][:TOGETHER]])
    with torch.no_grad(), with_adapters(opened.model, NANO, folders) as adapters:
        step = adapters.elastic.step
        numbers = [adapters.loaded[name].number for name in names] + [-1]
        every = torch.tensor(numbers).repeat_interleave(TOGETHER * LENGTH)
        step.adapter = every
        mixed = opened.model(input_ids=ids).logits
        for i, name in enumerate(names):
            own = slice(i * TOGETHER, (i + 1) * TOGETHER)
            step.adapter = torch.where(every == numbers[i], every, -1)  # the neighbours have none
            alone = opened.model(input_ids=ids).logits[own]
            merged = open_model(tuned[name]).model(input_ids=held[name][:TOGETHER]).logits
            same = {"bits": torch.equal(mixed[own], alone), "tokens": torch.equal(mixed[own].argmax(-1), merged.argmax(-1))}
            yield {"domain": name, "way": "one batch", "same": same, "difference": float((mixed[own] - merged).abs().max())}
        step.adapter = -1
        counts = [[len(own) for own in _layers(folder)] for folder in folders.values()]
        experts = adapters.layers[0].table.experts
        yield {"way": "memory", "bytes": adapters.bytes, "padded": fragmentation(experts, counts), "adapters": len(names)}


def times(folders: dict[str, Path], turns: int) -> Iterator[dict[str, Any]]:
    """Forwards of tokens that decode, and of a prompt's chunk: adapters are dealt to the tokens in turn."""
    bare, opened, names = open_model(NANO), open_model(NANO), list(folders)
    with torch.no_grad(), with_adapters(opened.model, NANO, folders) as adapters:
        numbers = [adapters.loaded[name].number for name in names]
        for tokens, length in ((4, 1), (32, 1), (1, 256)):
            ids = torch.arange(tokens * length).reshape(tokens, length) % 4000 + 20
            seconds: dict[str, list[float]] = {name: [] for name in ("base", "room", "one", "three")}
            for turn in range(turns + 3):
                for name, own in seconds.items():
                    among = {"one": [numbers[0], -1], "three": [*numbers, -1]}.get(name)
                    dealt = -1 if among is None else torch.tensor(among).repeat(tokens * length)[: tokens * length]
                    adapters.elastic.step.adapter = dealt
                    model = bare.model if name == "base" else opened.model
                    began = time.perf_counter()
                    model(input_ids=ids, use_cache=False)
                    if turn >= 3:
                        own.append(time.perf_counter() - began)
            adapters.elastic.step.adapter = -1
            for name in ("room", "one", "three"):
                ratio = np.array(seconds[name]) / np.array(seconds["base"])
                drawn = np.random.default_rng(0).integers(len(ratio), size=(1000, len(ratio)))
                middle = [float(v) for v in np.quantile(np.median(ratio[drawn], axis=1), (0.025, 0.975))]
                shape = f"{tokens} x {length}"
                yield {"way": "time", "adapters": name, "tokens": shape, "ratio": float(np.median(ratio)), "interval": middle}


def _layers(folder: Path) -> list[list[int]]:
    return json.loads((folder / "adapter.json").read_text())["layers"]  # type: ignore[no-any-return]


def rows(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    tokenizer, base = load_tokenizer(NANO), open_model(NANO)
    read = {
        side: {d: token_windows(tokenizer, f"domains/{d}", side, length=LENGTH, tokens=n).ids for d in args.domains}
        for side, n in (("calibration", 32768), ("evaluation", args.tokens))
    }
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        folders: dict[str, Path] = {}
        tuned: dict[str, Path] = {}
        for domain in args.domains:
            ids, held = read["calibration"][domain], read["evaluation"][domain]
            experts = chosen(ids, args.share)
            model = train(ids, experts, args.steps, seed)
            tuned[domain] = work / f"{domain}-{seed}"
            model.save_pretrained(tuned[domain])
            tokenizer.save_pretrained(tuned[domain])
            plain = losses(base.model, held)
            row = {"seed": seed, "domain": domain, "experts": sum(map(len, experts))}
            yield {**row, "way": "base", "nll": float(plain.mean()), "gain": 0.0, "interval": [0.0, 0.0], "bytes": 0}
            for keep in (None, *args.pack):
                out = work / f"{domain}-{seed}-{keep}"
                made = make_adapter(tuned[domain], NANO, out, AdapterOptions(pack=keep))
                with with_adapters(base.model, NANO, {domain: out}) as adapters, adapters.at(domain):
                    own = losses(base.model, held)
                less = plain - own
                way = "adapter" if keep is None else f"packed {keep:g}"
                found = {"nll": float(own.mean()), "gain": float(less.mean()), "interval": interval(less), "bytes": made.bytes}
                yield {**row, "way": way, **found}
            folders[domain] = work / f"{domain}-{seed}-None"
        for row in together(folders, tuned, read["evaluation"]):
            yield {"seed": seed, **row}
        for row in times(folders, args.turns):
            yield {"seed": seed, **row}


def show(row: dict[str, Any]) -> str:
    head = f"seed {row['seed']}  {row.get('domain', ''):8} {row['way']:12}"
    if row["way"] == "memory":
        return f"{head} {row['bytes'] / 1e6:.1f} MB for {row['adapters']} adapters; padding would take {row['padded']:.2f}x of the slots"
    if row["way"] == "time":
        low, high = row["interval"]
        return f"{head} {row['adapters']:5} of {row['tokens']:8} tokens: {row['ratio']:.3f} ({low:.3f} to {high:.3f}) of the base's time"
    if row["way"] == "one batch":
        return f"{head} same as alone: {row['same']['bits']}; tokens of the merged model: {row['same']['tokens']} ({row['difference']:.1e})"
    low, high = row["interval"]
    size = f"  {row['bytes'] / 1e6:.2f} MB" if row["bytes"] else ""
    return f"{head} {row['experts']:3} experts  NLL {row['nll']:.4f}  gain {row['gain']:.4f} ({low:.4f} to {high:.4f}){size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=lambda text: text.split(","), default=["prose", "headers", "web"])
    parser.add_argument("--share", type=float, default=0.5, help="of a layer's routing weight that the trained experts hold")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--pack", type=lambda text: [float(part) for part in text.split(",")], default=[0.2, 0.05])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = printed(rows(args, Path(work)), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "adapters", "arguments": vars(args), "rows": found}))


if __name__ == "__main__":
    main()
