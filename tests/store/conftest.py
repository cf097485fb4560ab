"""Models of this folder's tests."""

from __future__ import annotations

import pytest
import torch

from moe_prism.jobs.refactor import RefactorOptions, refactor
from tests.tiny_sources import save_tiny


@pytest.fixture(scope="module")
def elastic_half(shared, tmp_path_factory, tiny_calibration):
    """The tiny model stored as bfloat16."""
    source = tmp_path_factory.mktemp("half") / "m"
    save_tiny("olmoe", source, dtype=torch.bfloat16)
    return shared("elastic-half", lambda out: refactor(source, out, RefactorOptions(calibration=tiny_calibration)))
