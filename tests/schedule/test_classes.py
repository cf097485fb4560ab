import pytest

from moe_prism.errors import UsageError
from moe_prism.schedule.classes import default_classes, load_classes, read_classes

from .common import LADDER


def test_defaults_and_jobs():
    classes = default_classes()
    assert list(classes) == ["interactive", "standard", "batch"]
    job = classes["interactive"].job("a", 1.0, 10, 5, LADDER)
    assert (job.floor, job.ceiling, job.ttft, job.tpot, job.kind) == (1, 4, 0.45, 0.05, "interactive")
    assert classes["batch"].job("a", 1.0, 10, 5, LADDER).ttft is None
    assert classes["interactive"].slower(4).tpot == 0.2
    assert classes["batch"].slower(4).ttft is None


def test_yaml(tmp_path):
    path = tmp_path / "qos.yaml"
    path.write_text(
        "classes:\n  chat: {min_quality: 0.9, max_quality: 0.95, ttft_ms: 200, tpot_ms: 50, priority: -1}\n  rest: {}\n"
    )
    classes = load_classes(path)
    assert classes["chat"].ttft == 0.2
    assert classes["chat"].priority == -1
    assert classes["rest"].max_quality == 1.0
    job = classes["chat"].job("a", 0.0, 1, 1, LADDER)
    assert (job.floor, job.ceiling) == (1, 3)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "not a mapping"),
        ({}, "not a mapping"),
        ({"a": 3}, "'a' is not a mapping"),
        ({"a": {"min_qualty": 0.5}}, "no field 'min_qualty'"),
        ({"a": {"min_quality": 1.5}}, "min_quality is 1.5"),
        ({"a": {"min_quality": True}}, "min_quality is True"),
        ({"a": {"ttft_ms": "fast"}}, "ttft_ms is 'fast'"),
        ({"a": {"ttft_ms": 0}}, "ttft_ms is 0"),
        ({"a": {"tpot_ms": float("nan")}}, "tpot_ms is nan"),
        ({"a": {"priority": 1.5}}, "priority is 1.5"),
        ({"a": {"min_quality": 0.9, "max_quality": 0.8}}, "above max_quality"),
    ],
)
def test_errors_are_one_line_that_names_the_place(data, says):
    with pytest.raises(UsageError) as caught:
        read_classes(data, "qos.yaml")
    assert says in str(caught.value)
    assert "qos.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "other: {}", "classes: 3"])
def test_f13_bad_files(tmp_path, text):
    path = tmp_path / "qos.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_classes(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        load_classes(tmp_path / "none.yaml")


def test_means_are_over_tokens():
    low, top = LADDER.levels[0], LADDER.levels[-1]
    assert LADDER.mean({0: 3, LADDER.top: 1}) == ((3 * low.quality + top.quality) / 4, (3 * low.slots + top.slots) / 4)
    assert LADDER.mean({0: 5}) == (low.quality, low.slots) and LADDER.mean({}) == (0, 0)
