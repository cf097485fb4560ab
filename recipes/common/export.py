"""Write a trained model as a package folder: bfloat16 weights, tokenizer, and a model card with measured facts.

    python recipes/common/export.py recipes/nano --data build/nano --run build/nano/run --out src/moe_prism/nano

The recipe's card.md is the card, with the names of facts in braces. `--baseline FOLDER` also measures another checkpoint on the same
texts, in bits per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from train import new_model
from transformers import PreTrainedTokenizerFast

from moe_prism.data import read_documents, split_documents
from moe_prism.model import MoELayer, find_layers, load_model, load_tokenizer

TEMPERATURE = 0.6
WINDOW, WINDOWS_PER_FILE = 512, 8
SHARE_OF_A_TEXT = 6000  # characters, for the routing


def write_weights(run: Path, data: Path, out: Path) -> dict[str, Any]:
    state = torch.load(run / "state.pt", weights_only=True)
    model = new_model(state["recipe"], state["model"]["lm_head.weight"].shape[0])
    model.load_state_dict(state["model"])
    model.config._experts_implementation = None
    model = model.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(data / "tokenizer.json")),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    return {"steps": state["step"], "minutes": state["spent"] / 60, "tokens": state["tokens"]}


def held_out(source: str) -> list[str]:
    return [d.text for d in split_documents(read_documents(source), "evaluation", source=source)]


@torch.no_grad()
def bits_per_byte(folder: Path, texts: list[str]) -> float:
    """Of the first 8 windows of 512 tokens of every text."""
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
def routing_facts(folder: Path, texts: list[str]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Per layer: load entropy (1 = even) and shares; then held-out losses: as is, with the top-ranked expert replaced at random, and
    without shared experts."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    ids = tokenizer("\n".join(t[:SHARE_OF_A_TEXT] for t in texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    rows = rows[:: max(1, len(rows) // 24)][:24]  # a sample of all texts
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

    losses = {}
    for name, swap in (("loss_swapped", True), ("loss", False)):
        for layer, count in zip(layers, counts, strict=True):
            count.zero_()
            layer.install(observer(layer, swap))
        losses[name] = loss()
    share = [c / c.sum() for c in counts]
    facts = [
        {
            "entropy": float(-(p * p.clamp(min=1e-12).log()).sum() / math.log(len(p))),
            "largest": float(p.max()),
            "smallest": float(p.min()),
        }
        for p in share
    ]
    for name, module in model.named_modules():
        if name.endswith("shared_expert"):
            module.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
    return facts, losses | {"loss_without_shared": loss()}


@torch.no_grad()
def completions(folder: Path, prompts: Sequence[tuple[str, str]]) -> str:
    """Of (kind, prompt), as blocks of Markdown. A prompt has no newline at its end: the tokenizer joins it to what follows."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    blocks = []
    for kind, prompt in prompts:
        rows = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(0)
        ids = model.generate(**rows, max_new_tokens=64, do_sample=True, temperature=TEMPERATURE, pad_token_id=0)
        blocks.append(f"```{kind}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}\n```")
    return "\n\n".join(blocks)


def quality_rows(folder: Path, baseline: Path | None, names: Sequence[str]) -> str:
    """Bits per byte on every text, as rows of a table."""
    rows = []
    for name in names:
        texts = held_out(name)
        cells = [f"{bits_per_byte(path, texts):.3f}" for path in (folder, baseline) if path]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def facts_of(folder: Path, data: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the model and its routing."""
    model = load_model(folder)
    layers = find_layers(model)
    k = model.config.num_experts_per_tok
    parameters = sum(p.numel() for p in model.parameters())
    collected = json.loads((data / "data.json").read_text())
    train = collected["train"]
    routing, losses = routing_facts(folder, [t for name in recipe["evaluation"] for t in held_out(name)])
    return {
        "hidden": model.config.hidden_size,
        "layers": len(layers),
        "heads": model.config.num_attention_heads,
        "experts": layers[0].num_experts,
        "k": k,
        "vocabulary": model.config.vocab_size,
        "parameters": parameters / 1e6,
        "active": (parameters - sum((layer.num_experts - k) * layer.parameters_per_expert() for layer in layers)) / 1e6,
        "bytes_per_token": train["bytes"] / train["tokens"],
        "files": train["files"],
        "megabytes": train["bytes"] / 1e6,
        "routing": "\n".join(
            f"| {i} | {f['entropy']:.3f} | {f['largest']:.1%} | {f['smallest']:.1%} |" for i, f in enumerate(routing)
        ),
    } | losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--baseline", type=Path)
    args = parser.parse_args()
    recipe = json.loads((args.recipe / "config.json").read_text())
    facts = write_weights(args.run, args.data, args.out)
    facts |= recipe | facts_of(args.out, args.data, recipe)
    facts["quality"] = quality_rows(args.out, args.baseline, recipe["evaluation"])
    facts["completions"] = completions(args.out, recipe["prompts"])
    (args.out / "README.md").write_text((args.recipe / "card.md").read_text().format(**facts))
    shutil.copy(args.data / "manifest.tsv.gz", args.recipe / "manifest.tsv.gz")
    print(json.dumps({k: facts[k] for k in ("tokens", "quality", "loss", "loss_swapped", "parameters")}))


if __name__ == "__main__":
    main()
