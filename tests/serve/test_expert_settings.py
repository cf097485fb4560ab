"""Every policy and predictor that `ls` names, fitted and served: the tokens are those of the model in memory."""

from __future__ import annotations

from functools import partial

import httpx2
import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.cli.experts import store_options
from moe_prism.errors import UsageError
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.offload.cache import cache_policies
from moe_prism.offload.predict import predictors
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.options.experts import ExpertOptions
from moe_prism.options.fit import FitOptions
from moe_prism.store.fit import StoreFit
from tests.serve.house import open_house
from tests.tiers import by_night

PROMPTS = ["import os", "def main(", "class A:"]
FORESEEING = [name for name in cache_policies.names() if cache_policies.get(name).needs_future]
RUNNABLE = [name for name in cache_policies.names() if name not in FORESEEING]


def texts(house) -> list[str]:
    found = []
    for prompt in PROMPTS:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        answer = httpx2.post(f"{house.url}/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()["choices"][0]["text"])
    return found


@pytest.fixture(scope="module")
def world(tiny_levels, tmp_path_factory):
    """(folder, packed file, trace of both sides with inputs, what the model in memory says)"""
    model, tokenizer = load(tiny_levels)
    ids = tokenizer("\n".join(PROMPTS) + "\n\n    return x, y\n" * 6, return_tensors="pt").input_ids
    text = torch.cat([ids, ids.flip(1)], 1).unfold(1, 12, 6)[0][:6]
    trace = record(TraceRecorder(model, inputs=True), [("calibration", text[:4]), ("evaluation", text[4:])], prompt=1)
    with open_house(tiny_levels) as house:
        wanted = texts(house)
    return tiny_levels, tmp_path_factory.mktemp("store") / "p", trace, wanted


def served(world, tmp_path, monkeypatch, policy, predictor, **experts):
    """(texts, the store) of a server with these settings."""
    folder, file, trace, _ = world
    monkeypatch.setattr("moe_prism.jobs.fit_offload.StoreFit", partial(StoreFit, clock=lambda: 0.0))
    path = tmp_path / "settings.json"
    fit_offload(trace, path, FitOptions(share=0.4, policy=[policy], predictor=[predictor]))
    options = store_options(ExpertOptions(expert_memory="120000", expert_file=file, expert_settings=path, **experts))
    with open_house(folder, store=options) as house:
        return texts(house), house.built.service.engine.model._moe_prism.store


@pytest.mark.parametrize("name", by_night(RUNNABLE))
def test_every_policy_is_served_with_its_fit(name, world, tmp_path, monkeypatch):
    found, store = served(world, tmp_path, monkeypatch, name, "frequency", expert_policy=name, expert_ahead=0)
    assert found == world[3] and store.cache.counts.misses > 0


@pytest.mark.parametrize("name", by_night(predictors.names(), "gate"))
def test_every_predictor_is_served_with_its_fit(name, world, tmp_path, monkeypatch):
    options = {"expert_predictor": name, "expert_ahead": 3, "expert_ahead_always": True}
    found, store = served(world, tmp_path, monkeypatch, "hobbit", name, **options)
    assert found == world[3] and store.cache.counts.prefetched > 0


@pytest.mark.parametrize("name", FORESEEING)
def test_a_bound_is_refused_before_anything_is_read(name, world):
    options = store_options(ExpertOptions(expert_memory="120000", expert_policy=name))
    with pytest.raises(UsageError, match="knows the future"), open_house(world[0], store=options):
        pass
