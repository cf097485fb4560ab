"""Models that many tests share, each built once for all xdist workers."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

# before transformers is imported: stderr belongs to the commands under test, and nothing may reach for the network
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "MOE_PRISM_WHOLE", "stock"
)  # nothing is measured, so every run is the same; tests/elastic/test_times.py measures

import pytest
import torch

if not torch.cuda.is_available():  # before transformers imports Triton, which reads this once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from filelock import FileLock
from hypothesis import settings

from tests.tiny_sources import save_tiny

CALIBRATION_TOKENS, PROFILE_TOKENS = 4096, 1024

# A commit is judged by the same examples every time; the nightly tier draws new ones.
settings.register_profile("commit", derandomize=True, max_examples=40)


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in config.getoption("markexpr", ""):
        settings.load_profile("commit")


frozen: list[int] = []
"""How many modules were there whenever what was alive was taken for good."""


def pytest_collection_finish() -> None:
    """What collection leaves lives to the end: a collection of garbage, of which every engine that stops makes one, skips it then."""
    gc.collect()
    gc.freeze()
    frozen.append(len(sys.modules))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same where a test has imported much: torch and transformers are some million objects."""
    if len(sys.modules) > frozen[-1] + 200:
        pytest_collection_finish()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries that look for leaks at the end find none


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_worker() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[Path], object]], Path]:
    """shared(name, build): the folder that `build(folder)` filled, built by the first worker that asks."""
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent

    def get(name: str, build: Callable[[Path], object]) -> Path:
        folder, ready = root / name, root / f"{name}.ready"
        with FileLock(f"{folder}.building"):
            if not ready.exists():
                shutil.rmtree(folder, ignore_errors=True)
                build(folder)
                ready.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def text_file(shared) -> Path:
    """Some 100 kB of Python source: enough for windows of a tiny model, quick to tokenise."""

    def build(folder: Path) -> None:
        folder.mkdir()
        shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "argparse.py", folder / "text.py")

    return shared("text", build) / "text.py"


@pytest.fixture(scope="session")
def tiny_source(shared) -> Path:
    """A random olmoe model with prism-nano's tokenizer, in several shards."""
    return shared("tiny-olmoe", lambda folder: save_tiny("olmoe", folder))


@pytest.fixture(scope="session")
def tiny_dense(shared) -> Path:
    """A random llama model: its MLPs are layers of one expert."""
    return shared("tiny-llama", lambda folder: save_tiny("llama", folder))


@pytest.fixture(scope="session")
def tiny_calibration(text_file):
    """Calibration options that suit the tiny models."""
    from moe_prism.calibrate.options import CalibrateOptions

    return CalibrateOptions(text=str(text_file), tokens=2048, length=32, reservoir=256)


@pytest.fixture(scope="session")
def elastic_tiny(shared, tiny_source, tiny_calibration) -> Path:
    """The tiny olmoe model, refactored."""
    from moe_prism.jobs.refactor import RefactorOptions, refactor

    return shared("elastic-tiny", lambda out: refactor(tiny_source, out, RefactorOptions(calibration=tiny_calibration)))


@pytest.fixture(scope="session")
def elastic_nano(shared) -> Path:
    """prism-nano, refactored with the default solver on few tokens."""
    from moe_prism.calibrate.options import CalibrateOptions
    from moe_prism.jobs.refactor import RefactorOptions, refactor

    options = RefactorOptions(profile_tokens=PROFILE_TOKENS, calibration=CalibrateOptions(tokens=CALIBRATION_TOKENS))
    return shared("elastic-nano", lambda out: refactor("nano", out, options))
