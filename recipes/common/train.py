"""Train a small MoE of a stock transformers architecture: Muon for matrices, AdamW for the rest, on the CPU or a GPU.

`moe-prism train` has the same optimisers by steps, for a model in a few minutes. This script runs by the clock, for hours and compiled.

    python recipes/common/train.py --config recipes/nano/config.json --data build/nano --out build/nano/run --minutes 90

The learning rate follows the share of `--minutes` (or of `--steps`) that is gone, by the clock on the wall: a run ends on time on
any machine, even where it was paused. It saves every five minutes and continues from the last save. `autocast` in the configuration
multiplies in bfloat16, which a processor with AVX512-BF16 does several times faster; weights and optimisers stay in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from experts import sorted_experts
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from upcycle import start_from

from moe_prism.training.batches import Batches
from moe_prism.training.muon import Muon, learning_rate

ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
AUX, ZLOSS = 0.01, 1e-4
START = 32  # windows that a start from another model's weights looks at
ROUTERS = ("mlp.gate.", "shared_expert_gate")  # a few rows each: AdamW


def new_model(recipe: dict[str, Any], vocab: int, seed: int = 0) -> Any:
    """A model of the architecture and the shapes that a recipe's config.json gives, with weights drawn by the seed."""
    architecture = getattr(transformers, recipe["architecture"])
    config = architecture.config_class(vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **recipe["model"])
    config._experts_implementation = "sorted"
    torch.manual_seed(seed)
    model = architecture(config)
    for name, p in model.named_parameters():
        if p.ndim == 3:  # expert matrices: fan-in scaling, the library's 0.02 is far too small at this width
            nn.init.normal_(p, std=p.shape[-1] ** -0.5 * (0.5 if "down" in name else 1.0))
        elif p.ndim == 2 and "embed" not in name:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5 * (0.5 if "o_proj" in name or "lm_head" in name else 1.0))
        elif p.ndim == 2:
            nn.init.normal_(p, std=0.5)
    return model


def batches_of(path: Path, length: int, batch: int, seed: int) -> Batches:
    """Random windows of a token file."""
    return Batches(torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32)), length, batch, seed)


def router_losses(logits: tuple[Tensor, ...], k: int) -> tuple[Tensor, Tensor]:
    """Load balance per layer (Switch, eq. 4, summed over the k choices) and z-loss; means over layers."""
    balance, z = logits[0].new_zeros((), dtype=torch.float32), logits[0].new_zeros((), dtype=torch.float32)
    for layer in logits:
        p = layer.float().softmax(-1)
        chosen = torch.zeros_like(p).scatter_(1, p.topk(k, dim=-1).indices, 1.0)
        balance = balance + layer.shape[-1] * (chosen.mean(0) * p.mean(0)).sum() / k
        z = z + layer.float().logsumexp(-1).square().mean()
    return balance / len(logits), z / len(logits)


@torch.compile
def head_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Next-token cross-entropy of hidden [T, d]; compiled because log-softmax over the vocabulary is memory-bound."""
    return nn.functional.cross_entropy((hidden @ weight.t()).float(), target)


@torch.no_grad()
def held_out_loss(model: Any, path: Path, length: int, windows: int = 16) -> float:
    ids = np.fromfile(path, dtype=np.uint16).astype(np.int64)
    starts = np.linspace(0, len(ids) - length - 2, windows).astype(int)
    total = 0.0
    device = next(model.parameters()).device
    for lo in range(0, windows, 16):
        batch = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts[lo : lo + 16]])).to(device)
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        total += len(batch) * head_loss(hidden.flatten(0, 1), model.lm_head.weight, batch[:, 1:].flatten()).item()
    return total / windows


class Training:
    """Model, optimisers and where they stand; saved and continued as one file."""

    def __init__(self, recipe: dict[str, Any], data: Path, out: Path, seed: int) -> None:
        self.recipe, self.data, self.state = recipe, data, out / "state.pt"
        vocab = json.loads((data / "tokenizer.json").read_text())["model"]["vocab"]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = new_model(recipe, len(vocab), seed)
        if "start" in recipe and not self.state.exists():
            start_from(self.model, recipe["start"], batches_of(data / "train.bin", recipe["length"], START, seed)(0))
        self.model.to(self.device)
        self.k = recipe["model"]["num_experts_per_tok"]
        matrices = {
            n: p
            for n, p in self.model.named_parameters()
            if p.ndim >= 2 and not any(s in n for s in ("embed", "lm_head", *ROUTERS))
        }
        others = [p for n, p in self.model.named_parameters() if n not in matrices]
        self.rest = torch.optim.AdamW(others, lr=recipe["lr_rest"], betas=(0.9, 0.95), weight_decay=0.01)
        self.muon = Muon(matrices)
        self.batches = batches_of(data / "train.bin", recipe["length"], recipe["batch"], seed)
        self.backbone = torch.compile(self.model.model)
        self.step, self.tokens, self.spent = 0, 0, 0.0
        if self.state.exists():
            self.restore()

    def restore(self) -> None:
        saved = torch.load(self.state, weights_only=True, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.rest.load_state_dict(saved["adam"])
        for buffer, value in zip(self.muon.buffers.values(), saved["muon"], strict=True):
            buffer.copy_(value)
        self.step, self.tokens, self.spent = saved["step"], saved["tokens"], saved["spent"]

    def save(self) -> None:
        new = self.state.with_suffix(".new")
        state = {"model": self.model.state_dict(), "adam": self.rest.state_dict(), "muon": list(self.muon.buffers.values())}
        torch.save(state | {"step": self.step, "tokens": self.tokens, "spent": self.spent, "recipe": self.recipe}, new)
        new.replace(self.state)

    def update(self, rate: float) -> dict[str, float]:
        """One step at a share of the full learning rate."""
        batch = self.batches(self.step).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.recipe["autocast"]):
            out = self.backbone(batch[:, :-1], use_cache=False, output_router_logits=True)
            loss = head_loss(out.last_hidden_state.flatten(0, 1), self.model.lm_head.weight, batch[:, 1:].flatten())
        balance, z = router_losses(out.router_logits, self.k)
        (loss + AUX * balance + ZLOSS * z).backward()
        for group in self.rest.param_groups:
            group["lr"] = self.recipe["lr_rest"] * rate
        self.muon.step(self.recipe["lr_matrix"] * rate, weight_decay=0.02)
        self.rest.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch[:, :-1].numel()
        return {"loss": loss.item(), "balance": balance.item()}

    def held_out(self) -> dict[str, float]:
        """Nats per token on every held-out file of the data."""
        paths = sorted(self.data.glob("heldout*.bin"))
        return {p.stem: round(held_out_loss(self.model, p, self.recipe["length"]), 4) for p in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    run = Training(json.loads(args.config.read_text()), args.data, args.out, args.seed)
    log = (args.out / "log.jsonl").open("a")
    begin = last_save = time.monotonic()
    offset, mean = run.spent, math.nan
    while True:
        run.spent = offset + time.monotonic() - begin
        progress = max(run.spent / (60 * args.minutes), run.step / args.steps)
        if progress >= 1:
            break
        rate = learning_rate(progress)
        losses = run.update(rate)
        mean = losses["loss"] if math.isnan(mean) else 0.95 * mean + 0.05 * losses["loss"]
        if run.step % 20 == 0:
            row = {"step": run.step, "minutes": round(run.spent / 60, 2), "loss": round(mean, 4)}
            row |= {"balance": round(losses["balance"], 3), "lr": round(rate, 3)}
            log.write(json.dumps(row | (run.held_out() if run.step % 200 == 0 else {})) + "\n")
            log.flush()
        if time.monotonic() - last_save > 300:
            run.save()
            last_save = time.monotonic()
    run.save()
    print(json.dumps({"steps": run.step, "seconds": round(run.spent)}))


if __name__ == "__main__":
    main()
