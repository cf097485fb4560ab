"""Write the text of four domains that moe-prism ships: held-out and calibration files of the manifest, under permissive licences.

    python recipes/nano-mix/domains.py --fetched build/text --manifest build/nano-mix/manifest.tsv.gz --out src/moe_prism/data/domains

Its Python comes from packages, since defaults are chosen on the standard library. A Python file that has a near-copy among the files
of an installed package or of the standard library that prism-nano may have been trained on is left out. Beside the text stands NOTICE,
with projects, files and licences.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "common"))

from corpus import Source, Text, digest_of, read_source, split_of
from sources import PERMISSIVE, name_of, sources

from moe_prism.data import Document
from moe_prism.data.near_copies import NEAR, shingles, without_near_copies

OTHER_LANGUAGES = {"da", "de", "es", "fr", "ja", "ko", "pt-br", "ru", "tr", "zh-cn"}  # folders of manuals
LICENCES = PERMISSIVE | {"PSF-2.0", "BSL-1.0", "public domain"}
CHARACTERS = {"heldout": 170_000, "calibration": 240_000}  # of a domain
OF_A_FILE, AT_LEAST = 16_000, 1_000
OF_A_PROJECT = 0.35  # of a domain
HOLDERS = {  # of projects whose packages name those of all their parts
    "abseil": "Copyright The Abseil Authors",
    "apache2-doc": "Copyright The Apache Software Foundation",
    "boost": "Copyright the authors that each file names",
    "llvm": "Copyright the LLVM project's contributors",
    "llvm-14-doc": "Copyright the LLVM project's contributors",
    "node": "Copyright Node.js contributors; Copyright the V8 project authors (BSD-3-Clause)",
    "nodejs-doc": "Copyright Node.js contributors",
    "numpy": "Copyright (c) 2005-2025 NumPy Developers",
    "python-django-doc": "Copyright (c) Django Software Foundation and individual contributors",
    "python3.11-doc": "Copyright (c) 2001-2023 Python Software Foundation",
    "range-v3": "Copyright Eric Niebler and the authors that each file names",
    "scipy": "Copyright (c) 2001-2002 Enthought, Inc.; 2003 SciPy Developers",
    "sympy": "Copyright (c) 2006-2023 SymPy Development Team",
    "torch": "Copyright (c) 2016- Facebook, Inc. and the authors that PyTorch's LICENSE names",
}
_COPYRIGHT = re.compile(
    r"^.{0,6}Copyright.*\d{4}.*$|^.{0,6}\(c\) .*\d{4}.*$|^.{0,6}Copyright \(c\).*$", re.MULTILINE | re.IGNORECASE
)


def in_manifest(path: Path) -> dict[str, str]:
    """Digest -> split, of the two splits that no model is trained on."""
    rows = (line.split("\t") for line in gzip.decompress(path.read_bytes()).decode().splitlines()[1:])
    return {row[0]: row[1] for row in rows if row[1] != "train"}


def head_of(text: str) -> str:
    return text if len(text) <= OF_A_FILE else text[: text.rindex("\n", 0, OF_A_FILE) + 1]


def candidates(found: Iterable[Source], splits: dict[str, str], seed: int) -> list[Text]:
    """Heads of the files that may be shipped, held-out ones first, in an order of the seed, no near-copy among them."""
    heads: dict[str, Text] = {}
    for source in found:
        if source.project == "stdlib" or source.licence not in LICENCES:
            continue
        for text in read_source(source, name_of, seed):
            name, whole = text.document.name, text.document.text
            if (
                splits.get(digest_of(whole)) == text.split
                and len(whole) >= AT_LEAST
                and OTHER_LANGUAGES.isdisjoint(name.split("/"))
            ):
                heads.setdefault(name, Text(source, Document(name, head_of(whole)), text.split))
    order = sorted(heads)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda name: heads[name].split != "heldout")
    fresh = without_near_copies([heads[name].document for name in order])
    known = known_runs({d.name: d for d in fresh if heads[d.name].source.domain == "python"})
    return [heads[d.name] for d in fresh if known.get(d.name, 0.0) <= NEAR]


def known_runs(documents: dict[str, Document]) -> dict[str, float]:
    """The largest share of each document's runs of ten words that stand in one installed Python file of a training bucket."""
    runs = {name: set(shingles(d.text).tolist()) for name, d in documents.items()}
    owners: dict[int, list[str]] = {}
    for name, of in runs.items():
        for run in of:
            owners.setdefault(run, []).append(name)
    share = dict.fromkeys(runs, 0.0)
    for root in (Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))):
        for path in root.rglob("*.py"):
            if split_of(path.name) == "train":
                shared = Counter(n for run in shingles(path.read_text("utf-8", "ignore")).tolist() for n in owners.get(run, ()))
                share |= {n: max(share[n], count / len(runs[n])) for n, count in shared.items()}
    return share


def chosen(texts: Iterable[Text]) -> Iterator[Text]:
    """The first ones, until every domain has its characters on both sides."""
    used: dict[tuple[str, ...], int] = {}
    for text in texts:
        size = len(text.document.text)
        domain = (text.split, text.source.domain)
        project = (*domain, text.source.project)
        limit = CHARACTERS[text.split]
        if used.get(domain, 0) < limit and used.get(project, 0) + size <= OF_A_PROJECT * limit:
            used[domain] = used.get(domain, 0) + size
            used[project] = used.get(project, 0) + size
            yield text


def copyrights(source: Source) -> list[str]:
    """Lines of copyright from the project's licence files."""
    if source.project in HOLDERS:
        return [HOLDERS[source.project]]
    names = ("LICENSE", "LICENCE", "COPYING", "copyright", "license")
    roots = [source.root, *source.root.glob("usr/share/doc/*")]
    if source.domain == "python":
        roots += source.root.parent.glob(f"{source.project}-*.dist-info")
    files = sorted(
        p for r in roots for p in r.rglob("*") if p.is_file() and p.name.startswith(names) and "node_modules" not in p.parts
    )
    lines = (m.group().strip(" *#\t") for p in files for m in _COPYRIGHT.finditer(p.read_text("utf-8", errors="ignore")))
    return list(dict.fromkeys(lines))[:4] or [f"Copyright the authors of {source.project}"]


def notice(texts: list[Text]) -> str:
    parts = [
        "The text of four domains in domains.jsonl.gz comes from the files below, of other projects, under their own licences.\n"
        "Files longer than 16,000 characters are cut there. It serves to calibrate and to measure models. No shipped model was\n"
        "trained on it.\n"
        "The texts of the licences are in LICENCES; Apache-2.0 is that of moe-prism itself.\n"
    ]
    for project in sorted({t.source.project for t in texts}):
        of = [t for t in texts if t.source.project == project]
        files = sorted({t.document.name.removeprefix(f"{project}/") for t in of})
        parts.append(
            "\n".join([f"{project} ({of[0].source.licence})", *copyrights(of[0].source), *(f"    {f}" for f in files)]) + "\n"
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fetched", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = candidates(sources(args.fetched), in_manifest(args.manifest), args.seed)
    picked = sorted(chosen(texts), key=lambda t: (t.source.domain, t.split, t.document.name))
    rows = [json.dumps({"domain": t.source.domain, "name": t.document.name, "text": t.document.text}) for t in picked]
    with gzip.GzipFile(args.out / "domains.jsonl.gz", "wb", mtime=0) as f:
        f.write("\n".join(rows).encode() + b"\n")
    (args.out / "NOTICE").write_text(notice(picked))
    sizes: dict[tuple[str, str], list[int]] = {}
    for t in picked:
        sizes.setdefault((t.source.domain, t.split), []).append(len(t.document.text))
    for key, of in sorted(sizes.items()):
        print(key, len(of), "files", sum(of), "characters")


if __name__ == "__main__":
    main()
