"""Write a trained nano-steps as a checkpoint folder, with its share of right answers.

python recipes/nano-steps/export.py --data build/nano-steps --run build/nano-steps/run --out build/nano-steps/model
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "common"))
from export import write_weights
from steps import is_right, read
from transformers import GenerationConfig

from moe_prism.model import load_model, load_tokenizer

PROBLEMS = 100


@torch.no_grad()
def share_right(folder: Path, prompts: list[str]) -> float:
    """Of greedy answers."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    right = 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**ids, max_new_tokens=160, do_sample=False)
        right += is_right(read(prompt), tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return right / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    facts = write_weights(args.run, args.data, args.out)
    GenerationConfig(eos_token_id=0, pad_token_id=0, bos_token_id=0).save_pretrained(args.out)
    prompts = (args.data / "problems.txt").read_text().splitlines(keepends=True)[:PROBLEMS]
    share = share_right(args.out, prompts)
    half = 1.96 * math.sqrt(share * (1 - share) / len(prompts))
    print(json.dumps(facts | {"right": share, "interval": [share - half, share + half], "problems": len(prompts)}))


if __name__ == "__main__":
    main()
