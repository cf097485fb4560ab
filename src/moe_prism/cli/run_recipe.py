"""Recipes from Python: what `moe-prism run` does, without a word on the standard streams."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from ..cli import main
from ..errors import CorruptError, DoesNotFit, PrismError, UsageError
from ..result import Findings

ERRORS: dict[int, type[PrismError]] = {error.exit_code: error for error in (PrismError, UsageError, DoesNotFit, CorruptError)}


def run_recipe(file: str | Path, *, changes: tuple[str, ...] = (), resume: bool = False, force: bool = False) -> Findings:
    r"""Run the steps of a recipe, one after the other; a row per step, with what its command says as JSON.

    changes: KEY=VALUE, like refactor.n_sub=8. Raises what a step raises, with the steps before it done.

    >>> import moe_prism, pathlib
    >>> recipe = pathlib.Path("recipe.yaml")
    >>> _ = recipe.write_text("model: nano\nsteps:\n  - skip: {mean: 2, tokens: 256, length: 128, method: uniform}\n")
    >>> [step["name"] for step in moe_prism.run_recipe(recipe).to_records()]
    ['uniform-2']
    """
    words = ["run", str(file), *(word for change in changes for word in ("--set", change)), "--json"]
    words += [flag for flag, wanted in (("--resume", resume), ("--force", force)) if wanted]
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        code = main(words)
    steps: list[dict[str, Any]] = [json.loads(line) for line in said.getvalue().splitlines()]
    if code:
        last = steps[-1] if steps and "error" in steps[-1] else {"error": told.getvalue().strip(), "next_step": ""}
        raise ERRORS.get(code, PrismError)(last["error"], last["next_step"])
    return Findings({"steps": steps}, "steps")
