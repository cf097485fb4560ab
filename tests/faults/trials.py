"""Kill `refactor` and continue it, many times. Run by test_kill.py in a process of its own, which pays for the imports once and
forks for every run; prints one JSON object.

Two ways to choose the moment, both from a recorded seed: before a file-system event of the run (open, rename, remove: every state
a kill can leave on disk is reached by one of them, and the choice does not depend on the speed of the machine), and after a time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_prism import cli
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import OutputFolder
from moe_prism.jobs import calibrate
from moe_prism.jobs.refactor import RefactorOptions, refactor
from tests.tiny_sources import digests

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir")
ARGUMENTS = ("--tokens", "768", "--length", "32", "--reservoir", "128", "--profile-tokens", "64")


def options(text: str) -> RefactorOptions:
    return RefactorOptions(calibration=CalibrateOptions(text=text, tokens=768, length=32, reservoir=128), profile_tokens=64)


class Events:
    """Counts the file-system events of one output, by phase; `limit` = (phase, n) kills this process before that event."""

    def __init__(self, out: Path, limit: tuple[str, int] | None = None) -> None:
        self.prefix, self.limit, self.phase = str(out), limit, ""  # OUT, OUT.partial and OUT.lock
        self.counts: dict[str, int] = {}
        self.off = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.off or event not in EVENTS or not self.phase or not str(args[0]).startswith(self.prefix):
            return
        if (self.phase, self.counts.get(self.phase, 0)) == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)
        self.counts[self.phase] = self.counts.get(self.phase, 0) + 1


@contextmanager
def phases(tell: Callable[[str], None]):
    """tell(phase) as the run enters it; yields the `report` to give to `refactor`."""

    @contextmanager
    def report(title: str):
        tell(title)
        yield lambda _done, _total: None

    finish = OutputFolder.finish

    def told(self: OutputFolder) -> Path:
        tell("finish")
        return finish(self)

    OutputFolder.finish = told  # type: ignore[method-assign]
    try:
        yield report
    finally:
        OutputFolder.finish = finish  # type: ignore[method-assign]


def fork(work: Callable[[], int]) -> int:
    """Start work() in a child that ends with its result; returns the pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
        code = work()
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trials:
    """One tiny model, one reference run, and the folder in which every trial writes."""

    def __init__(self, source: str, text: str, root: str) -> None:
        self.source, self.text, self.root = source, text, Path(root).resolve()
        events = Events(self.root / "reference")
        began = time.monotonic()
        with phases(lambda phase: self._mark(events, phase)) as report:
            refactor(source, self.root / "reference", options(text), report=report)
        events.off = True
        self.total = time.monotonic() - began
        self.counts = dict(events.counts)
        self.wanted = digests(self.root / "reference")

    @staticmethod
    def _mark(events: Events, phase: str) -> None:
        events.phase = phase

    def one(self, seed: int, phase: str | None, part: tuple[int, int]) -> dict[str, Any]:
        """Kill one run, look at what is left, continue it, compare. phase None: kill at a random time instead.

        part (i, n): the moment is drawn from the i-th n-th of the phase, so that few trials reach its start and its end.
        """
        i, n = part
        share = (i + random.Random(seed).random()) / n
        folder = self.root / f"trial-{seed}"
        folder.mkdir()
        at = int(share * self.counts[phase]) if phase else share * self.total
        log = folder.with_suffix(".phase")
        pid = fork(lambda: self._run(folder / "out", (phase, at) if phase else None, log))
        if phase is None:
            time.sleep(at)
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        result = {"seed": seed, "at": at, "code": code, "phase": log.read_text() if log.exists() else "", **self._left(folder)}
        resumed = wait(fork(lambda: self._run(folder / "out", None, None, resume=True)))
        equal = resumed == 0 and digests(folder / "out") == self.wanted
        beside = sorted(p.name for p in folder.iterdir() if p.name != "out")
        shutil.rmtree(folder)
        return {**result, "resumed": resumed, "equal": equal, "beside": beside}

    def _run(self, out: Path, limit: tuple[str, int] | None, log: Path | None, resume: bool = False) -> int:
        events = Events(out, limit)

        def tell(phase: str) -> None:
            if log:
                log.write_text(phase)
            events.phase = phase

        with phases(tell) as report:
            refactor(self.source, out, options(self.text), resume=resume, report=report)
        return 0

    def _left(self, folder: Path) -> dict[str, Any]:
        """What the kill left: the result (complete or absent), work, temporaries."""
        out, work = folder / "out", folder / "out.partial"
        complete = None
        if out.exists():
            files = digests(out)
            files.pop("journal.json", None)  # the last file to go, and known to `verify`
            complete = files == self.wanted
        return {"complete": complete, "partial": work.exists(), "temporaries": len(list(work.glob("*.tmp*")))}

    def command(self, out: Path, *more: str) -> int:
        return cli.main(["refactor", self.source, "-o", str(out), "--text", self.text, *ARGUMENTS, *more])

    def stopped(self, out: Path, errors: Path) -> int:
        """Start the command and stop it (SIGSTOP) in its calibration; returns the pid."""

        def work() -> int:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
            os.dup2(2, 1)
            save = OutputFolder.save_tensors

            def told(self: OutputFolder, *args: Any) -> str:
                OutputFolder.save_tensors = save  # type: ignore[method-assign]
                os.kill(os.getpid(), signal.SIGSTOP)
                return save(self, *args)

            OutputFolder.save_tensors = told  # type: ignore[method-assign]
            return self.command(out)

        pid = fork(work)
        os.waitpid(pid, os.WUNTRACED)
        return pid

    def interrupt(self) -> dict[str, Any]:
        """SIGINT once: exit code, the line the user sees, and what --resume makes of it."""
        out, errors = self.root / "interrupted", self.root / "interrupted.err"
        pid = self.stopped(out, errors)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGCONT)
        code, visible = wait(pid), out.exists()
        resumed = wait(fork(lambda: self._run(out, None, None, resume=True)))
        lines = [line for line in errors.read_text().splitlines() if "error" in line]
        return {"code": code, "visible": visible, "lines": lines, "resumed": resumed, "equal": digests(out) == self.wanted}

    def twice(self) -> dict[str, Any]:
        """A second run on the same OUT while the first holds it."""
        out, errors = self.root / "twice", self.root / "second.err"
        first = self.stopped(out, self.root / "first.err")

        def second() -> int:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
            return self.command(out, "--resume")

        code = wait(fork(second))
        os.kill(first, signal.SIGCONT)
        done = wait(first)
        return {"code": code, "pid": first, "line": errors.read_text(), "first": done, "equal": digests(out) == self.wanted}


def main() -> None:
    source, text, root, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    calibrate.SNAPSHOT_SECONDS = 0.0  # a snapshot after every batch: the calibration of a tiny model too is killed between two
    trials = Trials(source, text, root)
    kinds = [*trials.counts, None]  # by event, evenly over the phases; every n-th by time
    rounds = count // len(kinds)
    rows = [trials.one(seed, kinds[seed % len(kinds)], (seed // len(kinds), rounds)) for seed in range(count)]
    result = {"counts": trials.counts, "trials": rows, "interrupt": trials.interrupt(), "twice": trials.twice()}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
