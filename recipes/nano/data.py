"""Collect Python source, split it by file, train the tokenizer and write token files for prism-nano.

A file's split is decided by the MD5 of its base name, the rule of `moe_prism.data.splits`: vendored copies of one module land
on the same side, and so does the same module of another Python version. A train file whose bytes also occur in another split
is dropped.

    python recipes/nano/data.py --out build/nano
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import site
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_prism.data.splits import CALIBRATION, HELD_OUT, bucket_of

# fmt: off
PACKAGES = [
    "torch", "transformers", "numpy", "scipy", "sympy", "networkx", "datasets", "lm_eval", "numba", "accelerate", "pip",
    "pandas", "sklearn", "matplotlib", "altair", "huggingface_hub", "tokenizers", "safetensors", "fsspec", "aiohttp", "pyarrow",
    "joblib", "nltk", "jsonschema", "mpmath", "narwhals", "click", "typer", "rich", "httpx2", "anyio", "requests", "urllib3",
    "fontTools", "PIL", "pydantic", "dateutil", "jinja2", "evaluate", "sacrebleu", "threadpoolctl", "torchgen",
]
# fmt: on
SKIP_DIRS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "site-packages", "_vendor"}
MAX_BYTES = 300_000  # longer files are tables, not programs
STDLIB_REPEATS = 3  # the bundled evaluation text is the standard library


def split_of(name: str) -> str:
    return {HELD_OUT: "heldout", CALIBRATION: "calibration"}.get(bucket_of(name), "train")


def source_files() -> list[tuple[str, Path]]:
    """(relative name, path) of every usable file, standard library first, in a stable order."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    roots = [("stdlib", stdlib)]
    for base in {Path(p) for p in [*site.getsitepackages(), sysconfig.get_path("purelib")]}:
        roots += [(p, base / p) for p in PACKAGES if (base / p).is_dir()]
    found = []
    for label, root in sorted(roots, key=lambda r: (r[0] != "stdlib", r[0])):
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIP_DIRS.isdisjoint(relative.parts[:-1]) and 200 <= path.stat().st_size <= MAX_BYTES:
                found.append((f"{label}/{relative.as_posix()}", path))
    return found


def is_program(text: str) -> bool:
    lines = text.splitlines()
    letters = sum(c.isalpha() or c.isspace() for c in text[:20_000])
    return len(text) / max(1, len(lines)) < 90 and letters / max(1, len(text[:20_000])) > 0.6


def read_splits() -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Texts per split as (name, text), without duplicates, and the manifest's lines."""
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "calibration": [], "heldout": []}
    manifest, seen = [], set()
    items = []
    for name, path in source_files():
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if is_program(text):
            items.append((name, text, hashlib.sha256(text.encode()).hexdigest()[:16], split_of(path.name)))
    for name, text, digest, split in sorted(items, key=lambda i: (i[3] == "train", i[0])):
        if digest not in seen:
            seen.add(digest)
            splits[split].append((name, text))
            manifest.append(f"{digest}\t{split}\t{len(text.encode())}\t{name}")
    return splits, manifest


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # digits one by one and indentation as its own piece: both keep the small vocabulary for words
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    splits, manifest = read_splits()
    rng = random.Random(args.seed)
    train = [t for n, t in splits["train"]] + [t for n, t in splits["train"] if n.startswith("stdlib/")] * (STDLIB_REPEATS - 1)
    rng.shuffle(train)
    sample = train[: max(200, len(train) // 4)]
    tokenizer = train_tokenizer(sample, args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"))
    with gzip.GzipFile(args.out / "manifest.tsv.gz", "wb", mtime=0) as f:
        f.write("\n".join(["sha256_16\tsplit\tbytes\tfile", *manifest]).encode() + b"\n")

    facts: dict[str, dict[str, int]] = {}
    held = [t for _, t in splits["heldout"]]
    held_std = [t for n, t in splits["heldout"] if n.startswith("stdlib/")]
    for split, texts in {"train": train, "heldout": held, "heldout_stdlib": held_std}.items():
        ids: list[int] = []
        for start in range(0, len(texts), 512):
            for encoding in tokenizer.encode_batch(texts[start : start + 512]):
                ids.append(0)  # a document starts with <|endoftext|>
                ids.extend(encoding.ids)
        np.array(ids, dtype=np.uint16).tofile(args.out / f"{split}.bin")
        facts[split] = {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": len(ids)}
    (args.out / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
