"""Collect four domains, split them by file, train the tokenizer and write token files for prism-nano-mix.

recipes/nano-mix/fetch.sh build/text
python recipes/nano-mix/data.py --fetched build/text --out build/nano-mix
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "common"))

from corpus import SPLITS, Text, read_splits
from sources import name_of, sources
from tokens import encode, train_tokenizer, write_tokens

DOMAINS = ("python", "prose", "headers", "web")
SAMPLE = 3_000_000  # characters of each domain that the tokenizer is trained on


def write_manifest(path: Path, splits: dict[str, list[Text]]) -> None:
    lines = ["sha256_16\tsplit\tbytes\tdomain\tlicence\tfile", *(t.line for s in SPLITS for t in splits[s])]
    with gzip.GzipFile(path, "wb", mtime=0) as f:
        f.write("\n".join(lines).encode() + b"\n")


def of_domain(texts: list[Text], domain: str) -> list[str]:
    return [t.document.text for t in texts if t.source.domain == domain]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fetched", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=5120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    splits = read_splits(sources(args.fetched), name_of, args.seed)
    for texts in splits.values():
        random.Random(args.seed).shuffle(texts)
    write_manifest(args.out / "manifest.tsv.gz", splits)
    sample = []
    for domain in DOMAINS:
        room = SAMPLE
        for text in of_domain(splits["train"], domain):
            if room > 0:
                sample.append(text)
                room -= len(text)
    tokenizer = train_tokenizer(sample, args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"))

    facts: dict[str, dict[str, int]] = {}
    rows = {d: encode(tokenizer, of_domain(splits["train"], d)) for d in DOMAINS}
    limit = min(sum(map(len, r)) for r in rows.values())  # the domains weigh the same
    train: list[list[int]] = []
    for domain, ids in rows.items():
        total, used = 0, 0
        while total < limit:
            total += len(ids[used])
            used += 1
        train += ids[:used]
        size = sum(len(t.encode()) for t in of_domain(splits["train"], domain)[:used])
        facts[f"train_{domain}"] = {"files": used, "bytes": size, "tokens": total}
    random.Random(args.seed).shuffle(train)
    facts["train"] = {k: sum(f[k] for f in facts.values()) for k in ("files", "bytes", "tokens")}
    write_tokens(args.out / "train.bin", train)
    for domain in DOMAINS:
        texts = of_domain(splits["heldout"], domain)
        count = write_tokens(args.out / f"heldout_{domain}.bin", encode(tokenizer, texts))
        facts[f"heldout_{domain}"] = {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": count}
    (args.out / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))
    for split, texts in splits.items():
        size: Counter[str] = Counter()
        for t in texts:
            size[f"{t.source.domain}/{t.source.project.split('/')[0]}"] += len(t.document.text)
        print(split, {k: round(v / 1e6, 2) for k, v in size.most_common(45)})


if __name__ == "__main__":
    main()
