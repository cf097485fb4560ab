"""PreMoE: what the router is sure of, the file of patterns, retrieval, and a server that keeps to a task."""

from __future__ import annotations

import httpx2
import pytest
import torch

from moe_prism.calibrate.confidence import BINS, threshold, utility
from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.prune import LayerSubject, criteria
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.calibrate import calibrate_model, read_statistics
from moe_prism.jobs.generate import generate
from moe_prism.jobs.patterns import TaskAsked, wear_pattern, write_patterns
from moe_prism.methods.merge.base import routed_layers
from moe_prism.methods.prune.patterns import Patterns
from moe_prism.model import find_layers
from moe_prism.model.router import Router
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.generate import GenerateOptions
from moe_prism.options.serve import ServeOptions
from tests.compress.tiny import IDS, PER_TOKEN, build, logits
from tests.serve.house import open_house


@torch.no_grad()
def test_it_is_what_a_loop_over_tokens_says():
    model = build("softmax")
    layers = find_layers(model)
    work = Pass(model, layers, Settings(collectors=("confidence",), batch=2))
    work.run(IDS)
    for number, layer in enumerate(layers):
        with Router(model, layer).watched() as scores:
            logits(model)
            z = scores().double()
        best = [row.topk(PER_TOKEN) for row in z]
        top = [float(own.values.softmax(0).max()) for own in best]
        values = work.statistics().layers[number].values["confidence"]
        assert threshold(values) == pytest.approx(sum(top) / len(top), rel=1e-6)
        for least in (0.0, 0.5, 24 / BINS):  # at the edges of bins nothing is shared out
            wanted = torch.zeros(layer.num_experts, dtype=torch.float64)
            for own in best:
                for expert, score, p in zip(own.indices, own.values, own.values.softmax(0), strict=True):
                    if float(p) >= least:
                        wanted[expert] += max(float(score), float(score.sigmoid())) / len(z)
            torch.testing.assert_close(utility(values, least), wanted, rtol=1e-6, atol=1e-9)
        exact = utility(values, threshold(values))
        assert (utility(values, threshold(values) + 1 / BINS) <= exact + 1e-12).all()
        subject = LayerSubject(
            0, "here", layer.num_experts, PER_TOKEN, {"confidence": values}, torch.zeros(layer.num_experts).bool()
        )
        assert torch.equal(criteria.get("premoe")().scores(subject), exact)


@pytest.fixture(scope="module")
def written(tiny_source, text_file, tmp_path_factory):
    """A model calibrated on two texts, and its patterns."""
    folder = tmp_path_factory.mktemp("patterns")
    (folder / "digits.txt").write_text("\n\n".join(f"{n} {n * n} {n * 7}" * 20 for n in range(200)))
    domains = [f"words={text_file}", f"digits={folder / 'digits.txt'}"]
    options = CalibrateOptions(domains=domains, tokens=2048, length=32, collectors=["confidence"])
    calibrate_model(tiny_source, folder / "statistics", options)
    write_patterns(folder / "statistics", folder / "patterns.json")
    return folder


def test_the_file_is_small_and_comes_back(tiny_source, written):
    found = Patterns.read(written / "patterns.json")
    made = Patterns.of(read_statistics(written / "statistics"))
    assert set(found.scores) == {"words", "digits"} and (written / "patterns.json").stat().st_size < 1 << 20
    for name in found.scores:
        for a, b in zip(found.scores[name], made.scores[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert found.nearest(made.scores["digits"][0]) == "digits" and found.nearest(made.scores["words"][0]) == "words"
    text = (written / "patterns.json").read_text()
    for wrong, words in ((text.replace('"patterns"', '"love"', 1), "kind"), (text[:-20], "is not JSON")):
        (written / "wrong.json").write_text(wrong)
        with pytest.raises(CorruptError, match=words):
            Patterns.read(written / "wrong.json")
    with pytest.raises(UsageError, match="no 'confidence' by domain"):
        Patterns.of(_without_domains(read_statistics(written / "statistics")))


def _without_domains(statistics):
    for layer in statistics.layers:
        layer.domains = {}
    return statistics


def test_a_prompt_finds_its_task_and_the_model_keeps_to_it(tiny_source, text_file, written, tmp_path):
    model, tokenizer = load_plain(tiny_source)
    (tmp_path / "prompts.txt").write_text(" ".join(f"{n} {n * n}" for n in range(500, 560)))
    named = wear_pattern(model, tokenizer, written / "patterns.json", TaskAsked(None, tmp_path / "prompts.txt", 0.5))
    assert named.name == "premoe-digits-0.5"
    other, _ = load_plain(tiny_source)
    layers = find_layers(other)
    point = Patterns.read(written / "patterns.json").point("digits", routed_layers(other, layers, [{}] * len(layers)), 0.5)
    assert point == named
    for name, words in (("love", "no pattern of 'love'"),):
        with pytest.raises(UsageError, match=words):
            wear_pattern(other, tokenizer, written / "patterns.json", TaskAsked(name, None, 0.5))
    with pytest.raises(UsageError, match="no file with text"):
        wear_pattern(other, tokenizer, written / "patterns.json", TaskAsked(None, tmp_path / "missing.txt", 0.5))


def load_plain(folder):
    from moe_prism.artefact.open import open_to_write

    return open_to_write(folder)


@pytest.mark.slow
def test_a_server_keeps_to_a_task(tiny_source, written):
    """Greedy tokens are those of the model at the pattern's point."""
    model, tokenizer = load_plain(tiny_source)
    layers = [layer.parts.layer for layer in model._moe_prism.layers]
    point = Patterns.read(written / "patterns.json").point("digits", routed_layers(model, layers, [{}] * len(layers)), 0.5).point
    wanted = generate(model, tokenizer, "one two three", point=point, sampling=GenerateOptions(max_tokens=8)).text
    with open_house(tiny_source, patterns=written / "patterns.json", task="digits") as house:
        body = {"model": "tiny", "prompt": "one two three", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = httpx2.post(f"{house.url}/completions", json=body, timeout=60).json()
    assert answer.get("choices", [answer])[0].get("text") == wanted, answer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "code"}, "belong to --patterns"),
        ({"patterns": "p.json"}, "wants one of --task and --task-prompts"),
        ({"patterns": "p.json", "task": "a", "task_prompts": "b"}, "wants one of --task and --task-prompts"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        ServeOptions(**options).check()
