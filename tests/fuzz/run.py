"""Coverage-guided fuzzing of every parser: `python -m tests.fuzz.run [--seconds 60] [TARGET...]`, or `make fuzz`.

atheris leads: inputs that reach new code are mutated further. Where it cannot be had, the same targets get random changes of the seeds
and of the corpus, and the run says so. What breaks a target is written to tests/fuzz/corpus/TARGET, which test_x05 reads for ever.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
LONGEST = 4096  # bytes of an input


def guided(name: str) -> None:
    """In a process of its own: libFuzzer does not come back."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["moe_prism"]):
        from tests.fuzz.targets import check

    atheris.Setup([sys.argv[0], *sys.argv[3:]], lambda data: check(name, data))
    atheris.Fuzz()


def random_changes(name: str, seconds: float) -> int:
    """The same without guidance; how many inputs."""
    from tests.fuzz.targets import SEEDS, check

    draw, pool, runs, until = random.Random(0), [*SEEDS[name], *kept(name)], 0, time.monotonic() + seconds
    while time.monotonic() < until:
        data = bytearray(draw.choice(pool))
        for _ in range(draw.randint(1, 8)):
            at = draw.randrange(len(data) + 1)
            data[at : at + draw.randint(0, 4)] = draw.randbytes(draw.randint(0, 4))
        try:
            check(name, bytes(data[:LONGEST]))
        except BaseException:
            keep(name, bytes(data[:LONGEST]))
            raise
        runs += 1
    return runs


def kept(name: str) -> list[bytes]:
    """What once broke a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))] if (CORPUS / name).is_dir() else []


def keep(name: str, data: bytes) -> Path:
    """For test_x05."""
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def run(name: str, seconds: int) -> tuple[int, str]:
    """(inputs, what broke: empty)."""
    from tests.fuzz.targets import SEEDS

    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place) / "inputs"
        inputs.mkdir()
        for i, data in enumerate([*SEEDS[name], *kept(name)]):
            (inputs / str(i)).write_bytes(data)
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST}",
            "-rss_limit_mb=8192",
            f"-artifact_prefix={place}/",
            "-verbosity=1",
        ]
        command = [sys.executable, "-m", "tests.fuzz.run", "--guided", name, *options, "-print_final_stats=1", str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 600)
        said = done.stderr + done.stdout
        count = re.search(r"number_of_executed_units: (\d+)", said)
        if done.returncode == 0:
            return int(count[1]) if count else 0, ""
        for artifact in (p for p in Path(place).iterdir() if p.is_file()):
            keep(name, artifact.read_bytes())
        return int(count[1]) if count else 0, said[-3000:]


def main() -> int:
    """Print a line per target; 1 where one broke."""
    if sys.argv[1:2] == ["--guided"]:
        guided(sys.argv[2])
        return 0
    from tests.fuzz.targets import FOLDER, TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=[*TARGETS])
    parser.add_argument("--seconds", type=int, default=60, help="per target")
    given = parser.parse_args()
    lead = importlib.util.find_spec("atheris") is not None
    print("atheris leads" if lead else "atheris is not installed: random changes, nothing leads them")
    broken = total = 0
    for name in given.targets:
        count, what = run(name, given.seconds) if lead else (random_changes(name, given.seconds), "")
        total, broken = total + count, broken + bool(what)
        print(f"{name}: {count} inputs, {'broken' if what else '0 defects'}\n{what}".strip(), flush=True)
    print(f"{total} inputs in all")
    shutil.rmtree(FOLDER, ignore_errors=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
