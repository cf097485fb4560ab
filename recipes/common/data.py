"""Collect the text of a recipe, split it by file, train the tokenizer and write token files.

    python recipes/common/data.py recipes/nano --out build/nano
    python recipes/common/data.py recipes/nano-mix --fetched build/text --out build/nano-mix

The recipe's sources.py says where text comes from, its config.json how large the vocabulary is and what is read several times. A file's
split follows from the MD5 of its name, the rule of `moe_prism.data.buckets`; near-copies of held-out text are in no other split. Of
every domain as many tokens are trained on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from pathlib import Path

from corpus import SPLITS, Text, read_splits
from tokenizers import Tokenizer
from tokens import encode, train_tokenizer, write_tokens

from moe_prism.model.load import resolve

SAMPLE = 3_000_000  # characters of each domain that the tokenizer is trained on


def write_manifest(path: Path, splits: dict[str, list[Text]]) -> None:
    lines = ["sha256_16\tsplit\tbytes\tdomain\tlicence\tfile", *(t.line for s in SPLITS for t in splits[s])]
    with gzip.GzipFile(path, "wb", mtime=0) as f:
        f.write("\n".join(lines).encode() + b"\n")


def of_domain(texts: list[Text], domain: str, repeats: dict[str, int]) -> list[str]:
    found = [t for t in texts if t.source.domain == domain]
    return [t.document.text for t in found for _ in range(repeats.get(t.source.project, 1))]


def balanced(rows: dict[str, list[list[int]]], texts: dict[str, list[str]]) -> tuple[list[list[int]], dict[str, dict[str, int]]]:
    """Documents of every domain until the smallest domain's tokens are reached, and what that is."""
    limit = min(sum(map(len, r)) for r in rows.values())
    train: list[list[int]] = []
    facts: dict[str, dict[str, int]] = {}
    for domain, ids in rows.items():
        total = used = 0
        while total < limit:
            total += len(ids[used])
            used += 1
        train += ids[:used]
        facts[f"train_{domain}"] = {"files": used, "bytes": sum(len(t.encode()) for t in texts[domain][:used]), "tokens": total}
    facts["train"] = {k: sum(f[k] for f in facts.values()) for k in ("files", "bytes", "tokens")}
    return train, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--fetched", type=Path, help="folder of text from elsewhere, where the recipe needs one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(args.recipe))
    from sources import name_of, sources

    config = json.loads((args.recipe / "config.json").read_text())
    splits = read_splits(sources(args.fetched), name_of, args.seed)
    for of_split in splits.values():
        random.Random(args.seed).shuffle(of_split)
    write_manifest(args.out / "manifest.tsv.gz", splits)
    domains = list(dict.fromkeys(t.source.domain for t in splits["train"]))
    texts = {d: of_domain(splits["train"], d, config.get("repeats", {})) for d in domains}
    for of in texts.values():
        random.Random(args.seed).shuffle(of)
    sample = []
    for of in texts.values():
        room = SAMPLE
        for text in of:
            if room > 0:
                sample.append(text)
                room -= len(text)
    if "tokenizer" in config:
        tokenizer = Tokenizer.from_file(str(resolve(config["tokenizer"]) / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(sample, config["vocabulary"])
    tokenizer.save(str(args.out / "tokenizer.json"))

    train, facts = balanced({d: encode(tokenizer, of) for d, of in texts.items()}, texts)
    random.Random(args.seed).shuffle(train)
    write_tokens(args.out / "train.bin", train)
    for domain in domains:
        held = of_domain(splits["heldout"], domain, {})
        count = write_tokens(args.out / f"heldout_{domain}.bin", encode(tokenizer, held))
        facts[f"heldout_{domain}"] = {"files": len(held), "bytes": sum(len(t.encode()) for t in held), "tokens": count}
    (args.out / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
