"""Peak memory of calibrate + refactor against the plan that `--dry-run` declares, and with and without `--low-memory`.

    python benchmarks/memory.py [--model nano] [--json]

Each run is a process of its own; its peak resident set is the one it reports (getrusage).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENTRY = "import sys; from moe_prism.cli import main; sys.exit(main(sys.argv[1:]))"


def command(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", ENTRY, *arguments, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def rows(model: str) -> list[dict[str, Any]]:
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for flags in ((), ("--low-memory",)):
            out = str(Path(folder) / f"out{len(flags)}")
            planned = command("refactor", model, "-o", out, "--dry-run", *flags)["peak_memory_bytes"]
            measured = command("refactor", model, "-o", out, *flags)["peak_rss_bytes"]
            result.append({"flags": " ".join(flags), "planned": planned, "measured": measured, "ratio": measured / planned})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = rows(args.model)
    if args.json:
        print(json.dumps({"benchmark": "memory", "model": args.model, "rows": found}))
        return
    for row in found:
        planned, measured = row["planned"] / 2**30, row["measured"] / 2**30
        print(f"{row['flags'] or 'default':14} planned {planned:.2f} GiB, measured {measured:.2f} GiB, ratio {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
