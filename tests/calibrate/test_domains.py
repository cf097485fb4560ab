"""Statistics of every domain of the text beside those of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_prism.calibrate.run import Pass, Settings, declared_bytes
from moe_prism.calibrate.statistics import LayerStatistics, Statistics
from moe_prism.errors import UsageError
from moe_prism.methods.prune.select import check_options, domains_of, rank
from moe_prism.model import find_layers
from moe_prism.options.prune import PruneOptions
from tests.compress.tiny import build

SUMS = ("counts", "outputs", "scores")
GENERATOR = torch.Generator().manual_seed(4)
CODE, PROSE = (torch.randint(*span, (rows, 16), generator=GENERATOR) for span, rows in (((3, 30), 5), ((30, 64), 3)))
PARTS = (("code", 5), ("prose", 3))


def run(model, ids, parts=(), batch=2, collectors=SUMS):
    settings = Settings(collectors=collectors, batch=batch, capacity=64, domains=tuple(name for name, _ in parts))
    work = Pass(model, find_layers(model), settings)
    work.run(ids, parts=parts)
    return work


@pytest.fixture(scope="module")
def model():
    return build("softmax")


@pytest.fixture(scope="module")
def both(model):
    return run(model, torch.cat([CODE, PROSE]), PARTS).statistics()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_domain_has_what_a_pass_over_it_alone_gathers(model, both):
    for name, ids in (("code", CODE), ("prose", PROSE)):
        alone = run(model, ids).statistics()
        for found, wanted in zip(both.layers, alone.layers, strict=True):
            for collector in SUMS:  # to the bit: no batch holds two domains
                assert same(found.domains[name][collector], wanted.values[collector]), (name, collector)


def test_all_text_is_the_sum_of_the_domains(model, both):
    plain = run(model, torch.cat([CODE, PROSE])).statistics()
    for found, wanted in zip(both.layers, plain.layers, strict=True):
        assert not wanted.domains
        for collector in SUMS:
            for key, value in wanted.values[collector].items():
                assert torch.allclose(found.values[collector][key].double(), value.double(), rtol=1e-6), (collector, key)


def test_a_sample_is_of_all_text_and_memory_is_declared(model):
    work = run(model, torch.cat([CODE, PROSE]), PARTS, collectors=("counts", "tokens"))
    layer = work.statistics().layers[0]
    assert set(layer.domains["code"]) == {"counts"} and set(layer.values) == {"counts", "tokens"}
    plain = Settings(collectors=("counts",))
    one, two = (declared_bytes(work.layers, s, 64) for s in (plain, replace(plain, domains=("a", "b"))))
    assert two == 2 * one


def test_files_and_an_interrupted_pass_keep_the_domains(model, both):
    for layer in both.layers:
        again = LayerStatistics.unflat(layer.name, layer.flat())
        assert again.domains.keys() == layer.domains.keys() and same(again.flat(), layer.flat())
    ids = torch.cat([CODE, PROSE])
    first = run(model, ids[:4], PARTS)
    second = Pass(model, find_layers(model), first.settings)
    second.load(first.state())
    second.run(ids, parts=PARTS)
    assert all(same(a.flat(), b.flat()) for a, b in zip(second.statistics().layers, both.layers, strict=True))


def test_every_domain_counts_alike_whatever_its_tokens(model, both):
    layers = find_layers(model)

    def scores(statistics, **options):
        return rank(layers, statistics, PruneOptions(keep=0.5, **options), 2)[0]

    alone = {name: scores(both, for_domain=[name]) for name in ("code", "prose")}
    shares = [[s / s.sum() for s in alone[name]] for name in alone]
    for found, a, b in zip(scores(both), *shares, strict=True):
        assert torch.allclose(found, (a + b) / 2)
    for found, layer in zip(alone["code"], both.layers, strict=True):
        assert torch.equal(found, layer.domains["code"]["outputs"]["easy"])
    # the same text as one sum follows the larger domain
    whole = scores(Statistics([LayerStatistics(x.name, x.values) for x in both.layers], both.profile))
    assert not all(torch.allclose(w / w.sum(), f) for w, f in zip(whole, scores(both), strict=True))


def test_a_domain_that_is_not_there_is_named(both):
    with pytest.raises(UsageError, match=r"has no domain 'law'.*code, prose"):
        domains_of(both, PruneOptions(for_domain=["law"]))
    plain = Statistics([LayerStatistics(x.name, x.values) for x in both.layers], both.profile)
    with pytest.raises(UsageError, match="--domain law=PATH"):
        domains_of(plain, PruneOptions(for_domain=["law"]))
    with pytest.raises(UsageError, match="no statistics by domain"):
        domains_of(both, PruneOptions(criterion="output-error", for_domain=["code"]))
    assert domains_of(both, PruneOptions(criterion="output-error")) == []
    with pytest.raises(UsageError, match="reads no text"):
        check_options(PruneOptions(criterion="random", for_domain=["code"]))
