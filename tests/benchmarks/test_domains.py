"""What benchmarks/domains.py makes of two runs: KL at the bytes of plain, and its interval."""

import numpy as np
import pytest

from moe_prism.artefact.open import open_model
from moe_prism.data import token_windows
from moe_prism.frontier.measure import measure
from moe_prism.point import FULL, OperatingPoint, SlotRule


@pytest.fixture
def domains(script):
    return script("domains")


def test_kl_at_equal_bytes_is_on_the_line_of_its_logarithm(domains):
    first, second = domains.Run(np.array([0.02, 0.06]), 0.56), domains.Run(np.array([0.05, 0.11]), 0.46)
    whole = np.array([[0, 1]])
    assert domains.kl_at(0.56, first, second, whole) == pytest.approx([0.04])
    assert domains.kl_at(0.46, first, second, whole) == pytest.approx([0.08])
    assert domains.kl_at(0.51, first, second, whole) == pytest.approx([np.sqrt(0.04 * 0.08)])
    assert domains.kl_at(0.5, second, second, whole) == pytest.approx([0.08])  # both runs read the same
    assert domains.kl_at(0.56, first, second, np.array([[0, 0], [1, 1]])) == pytest.approx([0.02, 0.06])


@pytest.mark.slow
def test_windows_alone_are_the_whole_text(domains, elastic_nano):
    opened = open_model(elastic_nano)
    ids = token_windows(opened.tokenizer, "domains/prose", "evaluation", length=64, tokens=256).ids
    point = OperatingPoint(slots=SlotRule(budget=0.5))
    (run,) = domains.run_points(opened.model, ids, [point])
    full, whole = measure(opened.model, ids, [FULL, point])
    assert len(run.kl) == len(ids) == 4
    assert run.kl.mean() == pytest.approx(whole.quality.kl, rel=1e-4)
    assert run.share == pytest.approx(whole.cost.active_expert_bytes / full.cost.active_expert_bytes, rel=1e-4)
    known = domains.standards(opened)
    assert list(known) == domains.AGAINST
    others = domains.run_points(opened.model, ids, [known["top-3"], known["int8"]])
    row, eight = domains.compare(opened.model, ids, others, seed=0)
    assert row["share"] == pytest.approx(0.75) and row["interval"][0] <= row["kl"] <= row["interval"][1]
    assert abs(row["second_share"] - 0.75) < 0.06 and row["ratio"] < 1
    assert 0.5 < eight["share"] < 0.6 and eight["other_kl"] < row["other_kl"]
