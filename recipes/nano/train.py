"""Train prism-nano: a stock transformers OLMoE, Muon for matrices, AdamW for the rest, float32 on the CPU or a GPU.

    python recipes/nano/train.py --data build/nano --out build/nano/run --minutes 90

The learning rate follows the share of `--minutes` (or of `--steps`) that is gone, so a run ends on time on any machine.
It saves every five minutes and continues from the last save.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from experts import sorted_experts
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ALL_EXPERTS_FUNCTIONS.register("nano_sorted", sorted_experts)
AUX, ZLOSS = 0.01, 1e-4


def new_model(args: argparse.Namespace, vocab: int) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=vocab,
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        num_experts=args.experts,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config._experts_implementation = "nano_sorted"
    torch.manual_seed(args.seed)
    model = OlmoeForCausalLM(config)
    for name, p in model.named_parameters():
        if p.ndim == 3:  # expert matrices: fan-in scaling, the library's 0.02 is far too small at this width
            nn.init.normal_(p, std=p.shape[-1] ** -0.5 * (0.5 if "down" in name else 1.0))
        elif p.ndim == 2 and "embed" not in name:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5 * (0.5 if "o_proj" in name or "lm_head" in name else 1.0))
        elif p.ndim == 2:
            nn.init.normal_(p, std=0.5)
    return model


class Muon:
    """Momentum, then the nearest (semi-)orthogonal matrix by five Newton-Schulz steps (Jordan et al. 2024). 3-D tensors are stacks."""

    def __init__(self, params: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.params, self.momentum = params, momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.0) -> None:
        for p, buffer in zip(self.params, self.buffers, strict=True):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            g = p.grad.lerp(buffer, self.momentum)
            # a fused gate_up stack is two matrices; orthogonalise each on its own
            parts = g.chunk(2, dim=1) if p.ndim == 3 and p.shape[1] == 2 * p.shape[2] else (g,)
            for target, part in zip(p.chunk(len(parts), dim=1) if len(parts) > 1 else (p,), parts, strict=True):
                target.mul_(1 - lr * weight_decay).add_(
                    orthogonal(part), alpha=-lr * max(1, part.shape[-2] / part.shape[-1]) ** 0.5
                )


def orthogonal(g: Tensor) -> Tensor:
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Batches:
    """Random windows: every stretch of the token file is visited once per epoch, in an order fixed by the seed."""

    def __init__(self, path: Path, length: int, batch: int, seed: int) -> None:
        self.ids = np.memmap(path, dtype=np.uint16, mode="r")
        self.length, self.batch, self.seed = length, batch, seed
        self.windows = (len(self.ids) - 1) // length

    def __call__(self, step: int) -> Tensor:
        epoch, start = divmod(step * self.batch, self.windows - self.windows % self.batch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
        rows = order[start : start + self.batch] * self.length
        return torch.from_numpy(np.stack([self.ids[r : r + self.length + 1] for r in rows]).astype(np.int64))


def router_losses(logits: tuple[Tensor, ...], k: int) -> tuple[Tensor, Tensor]:
    """Load balance per layer (Switch, eq. 4, summed over the k choices) and z-loss; means over layers."""
    balance, z = logits[0].new_zeros(()), logits[0].new_zeros(())
    for layer in logits:
        p = layer.softmax(-1)
        chosen = torch.zeros_like(p).scatter_(1, p.topk(k, dim=-1).indices, 1.0)
        balance = balance + layer.shape[-1] * (chosen.mean(0) * p.mean(0)).sum() / k
        z = z + layer.logsumexp(-1).square().mean()
    return balance / len(logits), z / len(logits)


@torch.compile
def head_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Next-token cross-entropy of hidden [T, d]; compiled because log-softmax over the vocabulary is memory-bound."""
    return nn.functional.cross_entropy(hidden @ weight.t(), target)


@torch.no_grad()
def held_out_loss(model: nn.Module, path: Path, length: int, windows: int = 64) -> float:
    ids = np.fromfile(path, dtype=np.uint16).astype(np.int64)
    starts = np.linspace(0, len(ids) - length - 2, windows).astype(int)
    total = 0.0
    device = next(model.parameters()).device
    for lo in range(0, windows, 16):
        batch = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts[lo : lo + 16]])).to(device)
        logits = model(batch[:, :-1], use_cache=False).logits
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (windows * length)


def learning_rate(progress: float) -> float:
    """Short warm-up, flat, then linear to zero over the last 45 %."""
    return min(1.0, progress / 0.01 + 0.02, (1 - progress) / 0.45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr-matrix", type=float, default=0.02)
    parser.add_argument("--lr-rest", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    vocab = json.loads((args.data / "tokenizer.json").read_text())["model"]["vocab"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(args, len(vocab)).to(device)
    matrices = [
        p for n, p in model.named_parameters() if p.ndim >= 2 and not any(s in n for s in ("embed", "lm_head", "mlp.gate."))
    ]
    ids = {id(p) for p in matrices}
    rest = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in ids], lr=args.lr_rest, betas=(0.9, 0.95), weight_decay=0.01
    )
    muon = Muon(matrices)
    batches = Batches(args.data / "train.bin", args.length, args.batch, args.seed)
    log = (args.out / "log.jsonl").open("a")
    state, step, spent = args.out / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        rest.load_state_dict(saved["adam"])
        for buffer, value in zip(muon.buffers, saved["muon"], strict=True):
            buffer.copy_(value)
        step, spent = saved["step"], saved["spent"]

    def save() -> None:
        torch.save(
            {"model": model.state_dict(), "adam": rest.state_dict(), "muon": muon.buffers, "step": step, "spent": spent},
            state.with_suffix(".new"),
        )
        state.with_suffix(".new").replace(state)

    backbone = torch.compile(model.model)
    begin = last_save = time.monotonic()
    offset, mean = spent, math.nan
    while True:
        spent = offset + time.monotonic() - begin
        progress = max(spent / (60 * args.minutes), step / args.steps)
        if progress >= 1:
            break
        lr = learning_rate(progress)
        batch = batches(step).to(device)
        out = backbone(batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = head_loss(out.last_hidden_state.flatten(0, 1), model.lm_head.weight, batch[:, 1:].flatten())
        balance, z = router_losses(out.router_logits, 4)
        (loss + AUX * balance + ZLOSS * z).backward()
        for group in rest.param_groups:
            group["lr"] = args.lr_rest * lr
        muon.step(args.lr_matrix * lr, weight_decay=0.02)
        rest.step()
        model.zero_grad(set_to_none=True)
        step += 1
        mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 0:
            row = {
                "step": step,
                "tokens": step * args.batch * args.length,
                "minutes": round(spent / 60, 2),
                "loss": round(mean, 4),
            }
            row |= {"balance": round(balance.item(), 3), "lr": round(lr, 3)}
            if step % 200 == 0:
                row["heldout"] = round(held_out_loss(model, args.data / "heldout.bin", args.length), 4)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if time.monotonic() - last_save > 300:
            save()
            last_save = time.monotonic()
    save()
    print(json.dumps({"steps": step, "tokens": step * args.batch * args.length, "seconds": round(spent)}))


if __name__ == "__main__":
    main()
