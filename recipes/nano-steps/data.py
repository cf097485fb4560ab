"""Write the tokens, the tokenizer and the texts of nano-steps.

    python recipes/nano-steps/data.py --out build/nano-steps

`train.txt` is what calibration may see, `problems.txt` has held-out questions, one a line, and `longer.txt` those that are longer than any
in training.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from steps import END, LONGER, SYMBOLS, problems
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

TEXT = 4000  # traces of train.txt


def tokenizer() -> Tokenizer:
    """One token for every character."""
    vocabulary = {symbol: i for i, symbol in enumerate((END, *SYMBOLS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([END])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chance, number = random.Random(args.seed), {symbol: i for i, symbol in enumerate((END, *SYMBOLS))}
    tokenizer().save(str(args.out / "tokenizer.json"))
    facts = {}
    for name, count, held_out in (("train", args.problems, False), ("heldout", 2000, True)):
        texts = [problem.trace(chance) for problem in problems(count, args.seed + held_out, held_out)]
        ids = [i for text in texts for i in (0, *map(number.__getitem__, text))]
        np.array([*ids, 0], dtype=np.uint16).tofile(args.out / f"{name}.bin")
        facts[name] = {"problems": count, "tokens": len(ids)}
        if not held_out:
            (args.out / "train.txt").write_text("".join(texts[:TEXT]))
    (args.out / "problems.txt").write_text("".join(problem.prompt for problem in problems(2000, args.seed + 2, True)))
    (args.out / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "longer.txt").write_text("".join(problem.prompt for problem in problems(2000, args.seed + 3, True, *LONGER)))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
