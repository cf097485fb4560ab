"""What benchmarks/quality.py decides before and after it measures."""

import pytest

from moe_prism.errors import UsageError
from moe_prism.jobs.refactor import RefactorOptions


@pytest.fixture
def quality(script):
    return script("quality")


def test_every_variant_can_be_refactored_and_chosen(quality):
    found = quality.variants(RefactorOptions(n_sub=16, gates=4, dropped=8))
    assert "default" in found and not any("," in name for name in found)
    for options, settings in found.values():
        options.check()
        assert settings and options.n_sub == 16
    assert list(quality.chosen(found, "paper, default")) == ["paper", "default"]
    assert quality.chosen(found, None) == found
    with pytest.raises(UsageError, match="unknown variant 'defualt'"):
        quality.chosen(found, "defualt")


def test_shares_by_hand(quality):
    def row(variant, rule, scorer, kl):
        return {"variant": variant, "rule": rule, "scorer": scorer, "budget": 0.5, "kl": kl}

    rows = [row("default", rule, scorer, kl) for rule, scorer, kl in (("threshold", "ridge", 0.2), ("threshold", "oracle", 0.1))]
    assert list(quality.shares(rows)) == []
    rows += [row("centrality gates", "pattern", "gates", 0.6), {"variant": "default", "scorer": "ridge", "rank": 0.9}]
    assert list(quality.shares(rows)) == [{"rule": "threshold", "budget": 0.5, "share": pytest.approx(0.8)}]
    rows.append(row("paper", "pattern", "gates", 0.5))
    assert list(quality.shares(rows)) == [{"rule": "threshold", "budget": 0.5, "share": pytest.approx(0.75)}]
