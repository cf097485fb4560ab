"""Kill every command that writes, many times, and look at what is left: `python -m tests.faults.kills [TRIALS] [COMMAND...]`.

One process pays for the imports and forks for every run. A run is killed before a file-system event of its own, drawn from a recorded
seed: every state that a kill can leave on disk is reached by one of them, whatever the speed of the machine. What is left must verify, as
it was or as it was to become, or the same command must end in the same bytes. Prints a JSON object per command.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_prism.artefact.load import load
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import put_file
from moe_prism.checkpoint.atomic import JOURNAL
from moe_prism.errors import PrismError
from moe_prism.jobs import calibrate
from moe_prism.jobs.frontier import measure_frontier
from moe_prism.jobs.frontier_files import keep_frontier
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.recover import recover_model
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.jobs.skip import make_skip_plan
from moe_prism.jobs.verify import verify
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.prune import PruneOptions
from moe_prism.options.recover import RecoverOptions
from moe_prism.options.skip import SkipOptions
from moe_prism.serve.engine.ladder import measure_ladder
from moe_prism.store import StoreOptions
from tests.faults.trials import Events, fork, wait
from tests.tiny_sources import digests, save_tiny

Run = Callable[[Path, bool], object]


@dataclass(frozen=True)
class Command:
    """run(folder, resume). inside: it changes a finished folder, which has to be whole all the time; else it writes a new one."""

    run: Run
    inside: bool


class House:
    """What the commands work on, and the commands."""

    def __init__(self, root: Path, text: Path) -> None:
        self.root, self.source, self.elastic = root, root / "source", root / "elastic"
        save_tiny("olmoe", self.source)
        self.calibration = CalibrateOptions(text=str(text), tokens=256, length=32, reservoir=64)
        refactor(self.source, self.elastic, self.options)
        frontier = FrontierOptions(text=str(text), tokens=64, length=32, rules=["product"])
        self.measured = measure_frontier(self.elastic, frontier)
        self.plan = make_skip_plan(self.elastic, SkipOptions(method="uniform", mean=1.0, text=str(text), tokens=64, length=32))
        self.model, self.tokenizer = load(self.elastic)

    @property
    def options(self) -> RefactorOptions:
        return RefactorOptions(calibration=self.calibration, profile_tokens=64)

    def commands(self) -> dict[str, Command]:
        prune = PruneOptions(keep=0.5, criterion="hard-count", protect=[], calibration=self.calibration)
        repair = RecoverOptions(method="repair", text=self.calibration.text, tokens=256, length=32)
        return {
            "calibrate": Command(lambda f, r: calibrate.calibrate_model(self.source, f, self.calibration, resume=r), False),
            "refactor": Command(lambda f, r: refactor(self.source, f, self.options, resume=r), False),
            "prune": Command(lambda f, r: prune_model(self.source, f, prune, resume=r), False),
            "recover": Command(lambda f, r: recover_model(self.elastic, f, repair, resume=r), False),
            "frontier": Command(lambda f, _: keep_frontier(self.measured, f), True),
            "skip": Command(lambda f, _: put_file(f / "plan.json", self.plan.encoded()), True),
            "serve": Command(lambda f, _: measure_ladder(self.model, self.tokenizer, f, tokens=512), True),
            "serve with a store": Command(lambda f, _: load(f, store=StoreOptions(1 << 28)), True),
        }


class Trials:
    """One command, its undisturbed run, and what every trial is compared with."""

    def __init__(self, house: House, command: Command) -> None:
        self.house, self.command = house, command
        self.events = 0
        log = house.root / "events"
        assert wait(fork(lambda: self._run(house.root / "reference", None, log))) == 0
        self.events = int(log.read_text())
        self.before = digests(house.elastic) if command.inside else None
        self.wanted = digests(house.root / "reference")
        shutil.rmtree(house.root / "reference")

    def _run(self, folder: Path, limit: int | None, log: Path | None, resume: bool = False) -> int:
        if self.command.inside and not folder.exists():
            shutil.copytree(self.house.elastic, folder)
        events = Events(folder, None if limit is None else ("run", limit))
        events.phase = "run"
        self.command.run(folder, resume)
        events.off = True
        if log:
            log.write_text(str(events.counts["run"]))
        return 0

    def one(self, seed: int, part: tuple[int, int]) -> dict[str, Any]:
        """part (i, n): the moment is drawn from the i-th n-th of the run."""
        i, n = part
        at = int((i + random.Random(seed).random()) / n * self.events)
        folder = self.house.root / f"trial-{seed}" / "out"
        folder.parent.mkdir()
        code = wait(fork(lambda: self._run(folder, at, None)))
        left = self._left(folder)
        again = wait(fork(lambda: self._run(folder, None, None, resume=True)))
        found = digests(folder) if folder.exists() else {}
        equal = again == 0 and found == self.wanted
        beside = sorted(p.name for p in folder.parent.iterdir() if p != folder)
        shutil.rmtree(folder.parent)
        return {"seed": seed, "at": at, "code": code, "left": left, "equal": equal, "beside": beside}

    def _left(self, folder: Path) -> str:
        """What a kill left: nothing, or a folder that `verify` calls whole and that is whole, or a defect."""
        if not folder.exists():
            return "nothing"
        try:
            verify(folder)
        except PrismError as error:
            return f"defect: {error}"
        found = {name: digest for name, digest in digests(folder).items() if not name.startswith(".update/") and name != JOURNAL}
        return "old" if found == self.before else "new" if found == self.wanted else "defect: neither the old folder nor the new"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    torch.set_num_threads(1)
    calibrate.SNAPSHOT_SECONDS = 0.0  # a snapshot after every batch: the calibration of a tiny model too is killed between two
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.py"
        text.write_text(Path(json.__file__).read_text() * 8)
        house = House(Path(scratch).resolve(), text)
        for name, command in house.commands().items():
            if len(sys.argv) > 2 and name not in sys.argv[2:]:
                continue
            trials = Trials(house, command)
            rows = [trials.one(seed, (seed, count)) for seed in range(count)]
            bad = [
                row for row in rows if not row["equal"] or row["left"].startswith("defect") or set(row["beside"]) - {"out.lock"}
            ]
            states = {state: sum(row["left"] == state for row in rows) for state in ("nothing", "old", "new")}
            killed = sum(row["code"] == -9 for row in rows)
            sys.stdout.write(
                json.dumps({"command": name, "events": trials.events, "killed": killed, **states, "bad": bad}) + "\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
