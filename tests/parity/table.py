"""docs/families.md: written by `python -m tests.parity.table`, checked by test_families.py."""

from __future__ import annotations

import gc
from pathlib import Path

import transformers

from .checks import BLOCKS, LIMIT, Result, measure
from .families import UNSUPPORTED, build, model_class, names

PATH = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = ("family", "model class", "experts layout", "layers found", "error permuted", "error split", "status")
HEADER = f"""# MoE families

Written by `python -m tests.parity.table` with transformers {{version}}; do not edit. `pytest tests/parity` checks it.

Every modelling file of that version that stores experts behind the experts interface: a tiny random-weight model of its
text part, float32, relative error of the logits (of the last hidden state where there is no language-model head) against the
model's own eager forward. *Permuted*: the neurons of every expert in random order. *Split*: every expert computed as {BLOCKS}
sub-experts at full budget, the larger error of the two executors. A family passes when both errors are at most {LIMIT:.0e}, its
tokens use different experts, and silencing the experts changes the output. {{passed}} of {{total}} pass.

"""


def bucket(error: float) -> str:
    """A power of ten above the error, so that the file does not change with the machine's rounding."""
    return next((f"<{limit:.0e}" for limit in (1e-6, LIMIT, 1e-3, 1e-1) if error < limit), ">=1e-01")


def row(family: str, result: Result | None) -> tuple[str, ...]:
    """One line of the table; result None for a family that could not be measured."""
    status = f"unsupported: {UNSUPPORTED[family]}" if family in UNSUPPORTED else "ok"
    if result is None:
        return (family, "", "", "", "", "", status)
    errors = bucket(result.permuted), bucket(result.split)
    return (family, model_class(family).__name__, result.layout, str(result.layers), *errors, status)


def render(rows: list[tuple[str, ...]]) -> str:
    passed = sum(r[-1] == "ok" for r in rows)
    head = HEADER.format(version=transformers.__version__, passed=passed, total=len(rows))
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read() -> tuple[str, dict[str, tuple[str, ...]]]:
    """The version and the rows of the file as it is."""
    text = PATH.read_text("utf-8")
    version = text.split("with transformers ", 1)[1].split(";", 1)[0]
    cells = [tuple(c.strip() for c in line.strip("|").split("|")) for line in text.splitlines() if line.startswith("| ")]
    return version, {c[0]: c for c in cells[2:]}


def attempt(family: str) -> Result | None:
    """The measurement, or None for a listed family that cannot be built or run."""
    try:
        return measure(build(family))
    except Exception:
        if family not in UNSUPPORTED:
            raise
        return None
    finally:
        gc.collect()  # a model is a web of references; without this they pile up


def main() -> None:
    rows = [row(family, attempt(family)) for family in names()]
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render(rows), "utf-8")
    print(f"{PATH.name}: {sum(r[-1] == 'ok' for r in rows)} of {len(rows)} families pass")


if __name__ == "__main__":
    main()
