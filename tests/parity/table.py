"""docs/families.md: written by `python -m tests.parity.table`, checked by test_families.py."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

import transformers

from .checks import BLOCKS, LIMIT, Result, measure
from .families import NOT_TAKEN, UNSUPPORTED, build, model_class, names
from .release import REFUSED, release_class

PATH = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = ("family", "model class", "experts layout", "layers found", "router", "error permuted", "error split", "status")
HEADER = f"""# MoE families

Written by `python -m tests.parity.table` with transformers {{version}}; do not edit. `pytest tests/parity` checks it.

Every modelling file of that version that stores experts behind the experts interface, and the families whose own form is understood
("no interface", or what stands instead of a layout). Each is a tiny random-weight model of the text part in float32. An error is the
relative error of the logits (of the last hidden state where there is no language-model head) against the model's own eager forward.
*Permuted*: the neurons of every expert in random order. *Split*: every expert computed as {BLOCKS} sub-experts at full budget, the
largest error of the executors. A family passes when both errors are at most {LIMIT:.0e}, its tokens use different experts, and
silencing the experts changes the output. {{passed}} of {{total}} pass. Whether the commands work on the form in which a family is
released, multimodal wrappers and all, is the second table.

*Router*: the probabilities that routing stages can ask for, proved on the family's own routing weights. In brackets: assumed, one expert
per token proves nothing. *none*: the router computes something else, or sees another input than the experts; such stages are refused.

"""
NOT_TAKEN_HEADER = """
## Not taken

Families with experts that `find_layers` refuses by name. Llama 4 is taken as it is published, with one expert per token: with several, each
would need an input of its own, because the routing weight multiplies the input. Of JetMoe the mixture of attention heads stays as it is.

| family | module | reason |
| --- | --- | --- |
"""


RELEASE_HEADER = """
## As released

The same families as their releases are saved: by their own class, with vision and audio towers in the file, in a tiny random model.
`inspect` reads it and knows every tensor. `refactor` gives the same text logits to 1e-05, leaves every tensor but the experts as it is,
passes `verify` and generates with half of its slots. `prune` halves the experts, and transformers loads the result. {passed} of {total}
pass all of it; of the others stands what they pass, and why not the rest. `pytest -m '' tests/parity/test_release.py` checks every row.

"""
RELEASE_COLUMNS = ("family", "class of the release", "works", "why not the rest")


def release_section() -> str:
    """The second table. What it says is proved by test_release.py."""
    rows = []
    for family in names():
        works, _, why = REFUSED.get(family, ("everything", "", ""))
        rows.append((family, release_class(family).__name__, "inspect, refactor" if works == "refactor" else works, why))
    head = RELEASE_HEADER.format(passed=sum(not row[3] for row in rows), total=len(rows))
    return head + _table([RELEASE_COLUMNS, tuple("---" for _ in RELEASE_COLUMNS), *rows])


def bucket(error: float) -> str:
    """A power of ten above the error, so that the file does not change with the machine's rounding."""
    return next((f"<{limit:.0e}" for limit in (1e-6, LIMIT, 1e-3, 1e-1) if error < limit), ">=1e-01")


def row(family: str, result: Result | None) -> tuple[str, ...]:
    """One line of the table; result None for a family that could not be measured."""
    status = f"unsupported: {UNSUPPORTED[family]}" if family in UNSUPPORTED else "ok"
    if result is None:
        return (family, "", "", "", "", "", "", status)
    errors = bucket(result.permuted), bucket(result.split)
    return (family, model_class(family).__name__, result.layout, str(result.layers), result.scores, *errors, status)


def render(rows: list[tuple[str, ...]]) -> str:
    passed = sum(r[-1] == "ok" for r in rows)
    head = HEADER.format(version=transformers.__version__, passed=passed, total=len(rows))
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    left = [(family, module, reason) for family, (module, reason) in NOT_TAKEN.items()]
    return head + _table(lines) + release_section() + NOT_TAKEN_HEADER + _table(left)


def _table(lines: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read() -> tuple[str, dict[str, tuple[str, ...]]]:
    """The version and the rows of the file as it is."""
    text = PATH.read_text("utf-8")
    version = text.split("with transformers ", 1)[1].split(";", 1)[0]
    first = text.split("\n## As released", 1)[0]
    cells = [tuple(c.strip() for c in line.strip("|").split("|")) for line in first.splitlines() if line.startswith("| ")]
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
