"""Where a model is loaded to, and in which type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_prism.checkpoint import load, load_to_run

HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("gpu", "asked", "dtype", "device"),
    [(False, None, torch.float32, "cpu"), (False, HALF, HALF, "cpu"), (True, None, None, "cuda"), (True, HALF, HALF, "cuda")],
)
def test_float32_on_a_cpu_and_as_stored_on_a_gpu_unless_asked_otherwise(monkeypatch, gpu, asked, dtype, device):
    def loaded(source, dtype):
        return SimpleNamespace(made=(source, dtype, "cpu"), cuda=lambda: SimpleNamespace(made=(source, dtype, "cuda")))

    monkeypatch.setattr(load, "load_model", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert load_to_run("nano", asked).made == ("nano", dtype, device)
