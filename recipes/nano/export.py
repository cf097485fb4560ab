"""Write the trained prism-nano as a package folder: bfloat16 weights, tokenizer, and a model card with measured facts.

    python recipes/nano/export.py --data build/nano --run build/nano/run --out src/moe_prism/nano

`--baseline FOLDER` also measures another checkpoint on the same held-out files, in bits per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from train import new_model
from transformers import PreTrainedTokenizerFast

from moe_prism.data import read_documents, split_documents
from moe_prism.model import MoELayer, find_layers, load_model, load_tokenizer

# without a newline at the end: the tokenizer joins it to the indentation that follows
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file."""',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "import os\nimport sys\n\nfor name in os.listdir(",
)
TEMPERATURE = 0.6
WINDOW, WINDOWS_PER_FILE = 512, 8


def write_weights(run: Path, data: Path, out: Path) -> dict[str, Any]:
    state = torch.load(run / "state.pt", weights_only=True)
    experts, twice, hidden = state["model"]["model.layers.0.mlp.experts.gate_up_proj"].shape
    layers = 1 + max(int(k.split(".")[2]) for k in state["model"] if k.startswith("model.layers."))
    args = argparse.Namespace(hidden=hidden, width=twice // 2, layers=layers, experts=experts, seed=0)
    model = new_model(args, state["model"]["lm_head.weight"].shape[0])
    model.load_state_dict(state["model"])
    model.config._experts_implementation = None
    model = model.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(data / "tokenizer.json")),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    return {"steps": state["step"], "minutes": state["spent"] / 60}


def held_out() -> list[str]:
    return [d.text for d in split_documents(read_documents("stdlib"), "evaluation", source="stdlib")]


@torch.no_grad()
def bits_per_byte(folder: Path, texts: list[str]) -> float:
    """Of the first 8 windows of 512 tokens of every held-out standard library file."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    nats = size = 0.0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: WINDOW * WINDOWS_PER_FILE]
        for start in range(0, len(ids), WINDOW):
            part = ids[start : start + WINDOW]
            rows = torch.tensor([[tokenizer.bos_token_id, *part]])
            nats += nn.functional.cross_entropy(model(rows[:, :-1]).logits[0], rows[0, 1:], reduction="sum").item()
            size += len(tokenizer.decode(part).encode())
    return nats / math.log(2) / size


@torch.no_grad()
def routing_facts(folder: Path, texts: list[str]) -> tuple[list[dict[str, float]], float, float]:
    """Per layer: load entropy (1 = even) and largest share; then held-out loss, as is and with the top-ranked expert replaced at random."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    ids = tokenizer("\n".join(t[:6000] for t in texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)[:24]
    layers = find_layers(model)
    counts = [torch.zeros(layer.num_experts) for layer in layers]

    def loss() -> float:
        logits = model(rows).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()

    def observer(layer: MoELayer, swap: bool) -> Any:
        generator = torch.Generator().manual_seed(layer.index)

        def experts(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            counts[layer.index] += torch.bincount(index.flatten(), minlength=layer.num_experts)
            if swap:
                index = index.clone()
                index[:, 0] = torch.randint(0, layer.num_experts, index[:, 0].shape, generator=generator)
            return layer.stock(x, index, weight)

        return experts

    losses = []
    for swap in (True, False):
        for layer, count in zip(layers, counts, strict=True):
            count.zero_()
            layer.install(observer(layer, swap))
        losses.append(loss())
    share = [c / c.sum() for c in counts]
    facts = [
        {
            "entropy": float(-(p * p.clamp(min=1e-12).log()).sum() / math.log(len(p))),
            "largest": float(p.max()),
            "smallest": float(p.min()),
        }
        for p in share
    ]
    return facts, losses[1], losses[0]


@torch.no_grad()
def completions(folder: Path) -> list[str]:
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    texts = []
    for prompt in PROMPTS:
        rows = tokenizer(prompt, return_tensors="pt")
        torch.manual_seed(0)
        ids = model.generate(**rows, max_new_tokens=64, do_sample=True, temperature=TEMPERATURE, pad_token_id=0)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def card(facts: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {i} | {f['entropy']:.3f} | {f['largest']:.1%} | {f['smallest']:.1%} |" for i, f in enumerate(facts["routing"])
    )
    samples = "\n\n".join(f"```python\n{t}\n```" for t in facts["completions"])
    config = facts["config"]
    baseline = f" (the {facts['baseline_name']} checkpoint: {facts['baseline']:.3f})" if "baseline" in facts else ""
    return f"""---
license: apache-2.0
library_name: transformers
tags: [mixture-of-experts, olmoe, code, tiny]
---

# prism-nano

A small Mixture-of-Experts language model of Python source code, trained by `recipes/nano/` for the demo, tests and benchmarks of
moe-prism: real routing, real specialisation, a real loss to lose. It is no assistant and knows nothing but the look of Python.

| | |
|---|---|
| architecture | OLMoE: hidden {config["hidden_size"]}, {config["num_hidden_layers"]} layers, {config["num_attention_heads"]} heads |
| experts | {config["num_experts"]} of width {config["intermediate_size"]}, top-{config["num_experts_per_tok"]}, not renormalised |
| parameters | {facts["parameters"] / 1e6:.2f} M in all, {facts["active"] / 1e6:.2f} M active per token |
| vocabulary | {config["vocab_size"]} (byte-level BPE, {facts["bytes_per_token"]:.2f} bytes per token on the training text) |
| trained on | {facts["tokens"] / 1e6:.1f} M tokens, {facts["steps"]} steps of 24 x 512, {facts["minutes"]:.0f} min on two CPU cores |
| optimiser | Muon (0.02) for matrices, AdamW (0.004) for the rest; balance loss 0.01 per layer, z-loss 0.0001 |
| held-out loss | **{facts["bits_per_byte"]:.3f} bits per byte** on the held-out standard library files{baseline} |

## Data

Python source of the standard library (without its tests, three times) and of installed packages: {facts["data"]["train"]["files"]} files,
{facts["data"]["train"]["bytes"] / 1e6:.0f} MB. A file's split follows from the MD5 of its base name: bucket 0 of 40 is held out,
bucket 1 is kept for calibration, the rest is for training; files with equal bytes are used once. `recipes/nano/manifest.tsv.gz` lists
each file with its SHA-256 and split. Each package's own licence applies to its source; the weights are released under Apache-2.0.

## Routing

Load entropy is relative to an even load (1.000), on held-out text.

| layer | load entropy | busiest expert | idlest expert |
|---|---|---|---|
{rows}

The experts are specialised: replacing the top-ranked expert of every token by a random one takes the held-out loss from
{facts["loss"]:.3f} to {facts["loss_swapped"]:.3f} nats per token.

## Completions

Sampled at temperature 0.6, seed 0.

{samples}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--baseline", type=Path)
    args = parser.parse_args()
    facts = write_weights(args.run, args.data, args.out)
    texts = held_out()
    model = load_model(args.out)
    layers = find_layers(model)
    k = model.config.num_experts_per_tok
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["active"] = facts["parameters"] - sum((layer.num_experts - k) * layer.parameters_per_expert() for layer in layers)
    facts["config"] = json.loads((args.out / "config.json").read_text())
    facts["data"] = json.loads((args.data / "data.json").read_text())
    facts["bytes_per_token"] = facts["data"]["train"]["bytes"] / facts["data"]["train"]["tokens"]
    facts["tokens"] = facts["steps"] * 24 * 512
    facts["bits_per_byte"] = bits_per_byte(args.out, texts)
    if args.baseline:
        facts |= {"baseline": bits_per_byte(args.baseline, texts), "baseline_name": args.baseline.name}
    facts["routing"], facts["loss"], facts["loss_swapped"] = routing_facts(args.out, texts)
    facts["completions"] = completions(args.out)
    (args.out / "README.md").write_text(card(facts))
    shutil.copy(args.data / "manifest.tsv.gz", Path(__file__).parent / "manifest.tsv.gz")
    print(json.dumps({k: facts[k] for k in ("tokens", "bits_per_byte", "loss", "loss_swapped", "parameters")}))


if __name__ == "__main__":
    main()
