"""What needs no engine: versions, request fields, refusals of a configuration, the command line."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from moe_prism.cli import main
from moe_prism.errors import UsageError
from moe_prism.point import FULL
from moe_prism.serve.vllm import compat, launch, whole, wiring
from moe_prism.serve.vllm.levels import Menu, full_slots, is_elastic
from tests.vllm.prompts import LEVELS


@pytest.fixture(scope="module")
def tiny_levels(elastic_tiny, tmp_path_factory):
    from tests.vllm.conftest import with_levels

    return with_levels(elastic_tiny, tmp_path_factory.mktemp("vllm") / "tiny")


@pytest.fixture(scope="module")
def menu(tiny_levels):
    (tiny_levels / "ladder.json").write_text(json.dumps({"levels": [{**row, "slots": row["slots"] / 2} for row in LEVELS]}))
    return Menu.of(tiny_levels)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0+cpu", "0.33.1"])
def test_known_versions(version):
    assert compat.version_problem(version) is None


@pytest.mark.parametrize("version", ["0.30.9", "0.34.0", "1.0", "dev", ""])
def test_unknown_versions_name_the_window(version):
    assert ">= 0.31 and < 0.34" in compat.version_problem(version)


def test_names_that_moved_are_named(monkeypatch):
    monkeypatch.setitem(compat._PLACES, "nowhere", "json.nowhere")
    with pytest.raises(UsageError, match=r"json.nowhere.nowhere; use vLLM >= 0.31"):
        compat.name("nowhere")
    monkeypatch.setitem(compat._PLACES, "JSONDecoder", "json")
    monkeypatch.setitem(compat._MEMBERS, "JSONDecoder", ("decode", "encode"))
    with pytest.raises(UsageError, match="JSONDecoder of this vLLM has no encode"):
        compat.name("JSONDecoder")


def test_levels_of_fields(menu):
    top = menu.ladder.top
    assert menu.read({}) == (top, top)
    assert menu.read({"quality": 0.7}) == (0, 0) and menu.read({"quality": 0.701}) == (1, 1)
    assert menu.read({"quality": "half", "min_quality": 0}) == (0, 1)
    assert menu.read({"min_quality": "most"}) == (2, top)
    assert menu.ladder.levels[1].point == FULL.with_budget(0.5) and menu.ladder.levels[top].point == FULL


def test_defaults_of_the_operator(tiny_levels, menu):
    eager = Menu.of(tiny_levels, {"quality": 0.85, "min_quality": 0.7})
    assert eager.default == eager.read({}) == (0, 1)
    assert eager.read({"quality": 1}) == (3, 3) and eager.read({"min_quality": 0.95}) == (2, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"qualty": 1}, "qualty"), ({"quality": -1}, "from 0 to 1"), ({"quality": "x"}, "no operating point 'x'")],
)
def test_bad_defaults(tiny_levels, options, words):
    with pytest.raises(UsageError, match=words):
        Menu.of(tiny_levels, options)


@pytest.mark.parametrize("value", [True, None, float("nan"), 1.5, [0.5]])
def test_values_that_mean_nothing(menu, value):
    with pytest.raises(UsageError, match="quality is"):
        menu.read({"quality": value})


def test_a_folder_without_levels_has_only_full(elastic_tiny):
    alone = Menu.of(elastic_tiny)
    assert len(alone.ladder) == 1 and alone.read({"quality": 0.1}) == (0, 0)


def test_what_is_elastic(elastic_tiny, tiny_source):
    assert is_elastic(elastic_tiny) and not is_elastic(tiny_source)
    assert full_slots(elastic_tiny) == 2 * json.loads((elastic_tiny / "prism.json").read_text())["n_sub"]


def configuration(folder, **changes):
    """The parts of a VllmConfig that `configure` looks at."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), quantization=None, logits_processors=None),
        parallel_config=SimpleNamespace(
            worker_cls="auto", pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None),
        speculative_config=None,
        additional_config={},
    )
    for path, value in changes.items():
        part, _, field = path.partition("__")
        if field:
            setattr(getattr(config, part), field, value)
        else:
            setattr(config, part, value)
    return config


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(compat, "name", lambda what: SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setenv(wiring.FOLDER, "")
    monkeypatch.setenv(wiring.POINTS, "[]")
    monkeypatch.setenv(whole.REASON, "")


def test_an_elastic_folder_is_wired(tiny_levels, on_cpu):
    config = configuration(tiny_levels)
    wiring.configure(config)
    assert (config.scheduler_config.scheduler_cls, config.parallel_config.worker_cls) == (wiring.SCHEDULER, wiring.WORKER)
    assert config.model_config.logits_processors == [wiring.CHECK]
    assert config.additional_config == {"moe_prism": {"wired": 1}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__enable_expert_parallel": True}, "expert parallelism"),
        ({"model_config__quantization": "fp8"}, "fp8"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"scheduler_config__scheduler_cls": "mine.Scheduler"}, "class of your own"),
        ({"parallel_config__worker_cls": "mine.Worker"}, "class of your own"),
    ],
)
def test_what_cannot_be_split_is_served_whole_and_says_so(tiny_levels, on_cpu, caplog, changes, words):
    config = configuration(tiny_levels, **changes)
    wiring.configure(config)
    assert config.scheduler_config.scheduler_cls in (None, "mine.Scheduler")
    assert config.parallel_config.worker_cls != wiring.WORKER and config.model_config.logits_processors == [wiring.CHECK]
    assert "requests for less are refused" in caplog.text
    for fields in ({}, {"quality": 1}, {"quality": "full"}, {"something": 1}):
        whole.check(fields)
    for fields in ({"quality": 0.7}, {"min_quality": "half"}):
        with pytest.raises(ValueError, match=f"full quality only: .*{words}"):
            whole.check(fields)
    config.additional_config = {"moe_prism": {"quality": 0.7}}
    with pytest.raises(UsageError, match="cannot serve a quality below 1"):
        wiring.configure(config)


def test_an_engine_that_can_forgets_what_another_could_not(tiny_levels, on_cpu):
    wiring.configure(configuration(tiny_levels, model_config__quantization="fp8"))
    with pytest.raises(ValueError, match="full quality only"):
        whole.check({"quality": 0.7})
    wiring.configure(configuration(tiny_levels))
    whole.check({"quality": 0.7})


def test_drafts_take_a_worker_that_leaves_the_check_out(tiny_levels, on_cpu, monkeypatch):
    config = configuration(tiny_levels, speculative_config=object())
    wiring.configure(config)
    assert config.parallel_config.worker_cls == wiring.UNCHECKED
    monkeypatch.setattr(compat, "name", lambda what: SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(UsageError, match="VLLM_PLUGINS=none"):
        wiring.configure(configuration(tiny_levels, speculative_config=object()))


def test_other_models_are_left_alone(tiny_source, on_cpu):
    config, before = configuration(tiny_source), configuration(tiny_source)
    wiring.configure(config)
    assert vars(config.scheduler_config) == vars(before.scheduler_config) and config.additional_config == {}


def test_the_command_hands_over(elastic_tiny, monkeypatch):
    called = []
    monkeypatch.setattr(compat, "problem", lambda: None)
    monkeypatch.setattr(launch.os, "execve", lambda *arguments: called.append(arguments))
    assert main(["serve", str(elastic_tiny), "--engine", "vllm", "--port", "8123", "--api-key", "k"]) == 0
    ((program, command, environment),) = called
    assert program == sys.executable and command[command.index("--port") + 1] == "8123"
    assert environment["VLLM_API_KEY"] == "k" and "k" not in command  # a key on a command line can be read by everybody


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "fifo"], "--policy is not available with --engine vllm"),
        (["--host", "0.0.0.0"], "needs a key"),
    ],
)
def test_the_command_refuses(elastic_tiny, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(compat, "problem", lambda: None)
    monkeypatch.delenv("MOE_PRISM_API_KEY", raising=False)
    assert main(["serve", str(elastic_tiny), "--engine", "vllm", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_vllm_the_command_says_so(elastic_tiny, monkeypatch, capsys):
    monkeypatch.setattr(compat, "find_spec", lambda name: None)
    assert main(["serve", str(elastic_tiny), "--engine", "vllm"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("known", [True, False])
def test_constant_experts_are_refused_where_vllm_would_ignore_them(tmp_path, on_cpu, monkeypatch, known):
    monkeypatch.setattr(compat, "knows_constant_experts", lambda: known)
    config = configuration(tmp_path, model_config__hf_text_config=SimpleNamespace(approximate_experts={"0": [1]}))
    if known:
        wiring.configure(config)
    else:
        with pytest.raises(UsageError, match=r"vLLM 0\.33 or newer"):
            wiring.configure(config)
