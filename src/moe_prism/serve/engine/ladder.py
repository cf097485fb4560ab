"""The levels that are served: points of the `threshold` rule, from the folder's frontier or measured once at start."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...elastic.runtime import Setting, slots_per_token
from ...errors import PrismError, UsageError
from ...files import replace_file
from ...frontier import Frontier
from ...schedule.base import Ladder, Level

RULE = "threshold"
FULL = "full"
MEASURED = "ladder.json"
BUDGETS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def find_ladder(folder: Path, full_slots: int) -> tuple[Ladder | None, str]:
    """(ladder, where from): the frontier's Pareto points, else an earlier measurement; None if there is neither."""
    frontier = folder / "frontier.json"
    if frontier.exists():
        points = [p for p in Frontier.load(frontier).points if p.rule == RULE and p.pareto and p.budget < 1]
        if points:
            levels = (Level(p.name, p.budget, p.k_slots, p.top1_agreement) for p in points)
            return climb(levels, full_slots), frontier.name
    measured = folder / MEASURED
    if measured.exists():
        try:
            return climb((Level(**row) for row in json.loads(measured.read_text())["levels"]), full_slots), measured.name
        except (ValueError, TypeError, KeyError, PrismError) as error:
            raise UsageError(f"{measured} cannot be used: {error}", "delete it; it is measured again at start") from error
    return None, ""


def climb(levels: Iterable[Level], full_slots: int) -> Ladder:
    """The levels sorted, without those that cost more and give no more, and the full model on top."""
    kept: list[Level] = []
    for level in sorted(levels, key=lambda level: (level.slots, -level.quality)):
        if level.budget < 1 and level.slots < full_slots and level.quality < 1 and (not kept or level.quality > kept[-1].quality):
            kept.append(level)
    return Ladder((*kept, Level(FULL, 1.0, float(full_slots), 1.0)))


def measure_ladder(model: Any, tokenizer: Any, folder: Path, tokens: int = 4096) -> Ladder:
    """Measure a few budgets on held-out text and keep the result beside the model, if the folder can be written."""
    from ...checkpoint import read_manifest, update_manifest
    from ...data import token_windows
    from ...frontier.measure import measure

    exclude = read_manifest(folder)["calibration"]["documents"]
    windows = token_windows(tokenizer, "stdlib", "evaluation", length=512, tokens=tokens, exclude=exclude)
    elastic = model._moe_prism
    settings = [Setting(budget, RULE) for budget in BUDGETS]
    found = measure(model, elastic, windows.ids, settings)
    levels = [
        Level(f"{RULE}-{cost.k_slots:.3g}", budget, cost.k_slots, quality.top1_agreement)
        for budget, (quality, cost) in zip(BUDGETS, found, strict=True)
    ]
    ladder = climb(levels, slots_per_token(elastic))
    rows = {"levels": [asdict(level) for level in ladder.levels[:-1]], "tokens": windows.tokens, "text": windows.source}
    try:
        replace_file(folder / MEASURED, (json.dumps(rows, indent=1) + "\n").encode())
        update_manifest(folder, {})  # `verify` knows every file of the folder
    except OSError:
        return ladder  # a read-only model is served all the same, and measured again next time
    return ladder
