"""Which text a model gets by default, and when somebody is told that it may be the wrong one."""

from __future__ import annotations

import json
import shutil

import pytest

from moe_prism import cli
from moe_prism.jobs.which_text import default_source, described, doubt, texts_of, with_text
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.text import TextSource
from tests.tiny_sources import save_tiny


def test_the_default_follows_the_model(tiny_source, elastic_tiny, elastic_nano, text_file, tmp_path):
    assert default_source("nano").label == "stdlib" and default_source("nano-mix").label == "domains"
    assert default_source(tiny_source).label == "domains"
    assert default_source(elastic_nano).label == "stdlib"
    assert default_source(elastic_tiny).label == str(text_file)  # what it was calibrated on
    gone = shutil.copytree(elastic_tiny, tmp_path / "gone")
    manifest = json.loads((gone / "prism.json").read_text())
    assert manifest["calibration"]["text"] == str(text_file)


def test_what_was_named_stays(tiny_source):
    assert with_text(FrontierOptions(text="topics"), tiny_source).text == "topics"
    assert with_text(FrontierOptions(domains=["a=topics"]), tiny_source).text is None
    assert with_text(CalibrateOptions(tasks=["x.jsonl"]), tiny_source).text is None
    filled = with_text(CalibrateOptions(), tiny_source)
    assert filled.text == "domains" and with_text(filled, "nano").text == "domains"
    assert "JavaScript, JSON" in described(TextSource.of("domains"))


@pytest.mark.parametrize(
    ("card", "name", "said"),
    [
        ("---\nlanguage: zh\n---\n", "m", "names the language zh"),
        ("---\nlanguage:\n- ja\n- ko\n---\n", "m", "names the language ja, ko"),
        ("---\nlanguage: [en, zh]\n---\n", "m", None),
        ("---\ntags: [text-generation, medical]\n---\n", "m", "speaks of medicine"),
        ("", "Qwen-Math-MoE", "speaks of math"),
        ("---\nlanguage: *x\n---\n", "m", None),
        ("no front matter", "m", None),
    ],
)
def test_a_card_or_a_name_that_speaks_of_other_text_is_told(tmp_path, card, name, said):
    save_tiny("olmoe", tmp_path / name)
    (tmp_path / name / "README.md").write_text(card)
    found = doubt(tmp_path / name, TextSource.of("domains"))
    assert (found is None) == (said is None) and (said is None or (said in found and "--text" in found))
    assert doubt(tmp_path / name, TextSource.of("my/own/text")) is None


@pytest.mark.parametrize("byte_level", [False, True])
def test_a_vocabulary_in_other_letters_is_told(tmp_path, byte_level):
    save_tiny("olmoe", tmp_path / "m")
    path = tmp_path / "m/tokenizer.json"
    data = json.loads(path.read_text())
    words = ["слово", "ещё", "дом", "word"]
    if byte_level:
        from tokenizers.pre_tokenizers import ByteLevel

        words = [ByteLevel(add_prefix_space=True).pre_tokenize_str(word)[0][0] for word in words]
    data["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    path.write_text(json.dumps(data))
    assert "75% of the words of its tokenizer" in doubt(tmp_path / "m", TextSource.of("domains"))
    assert doubt("nano", TextSource.of("stdlib")) is None


def test_the_first_lines_name_the_text(tmp_path, tiny_source, elastic_tiny, text_file, capsys):
    small = ("--tokens", "256", "--length", "32")
    source = shutil.copytree(tiny_source, tmp_path / "source")
    (source / "README.md").write_text("---\nlanguage: fr\n---\n")
    assert cli.main(["refactor", str(source), "-o", str(tmp_path / "out"), *small, "--profile-tokens", "0"]) == 0
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first.startswith("calibration text: domains (Python, English documentation") and "256 tokens" in first
    assert second.startswith("warning: the model's card names the language fr")
    assert cli.main(["frontier", str(elastic_tiny), "-o", str(tmp_path / "report"), *small, "--per-method", "2"]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"evaluation text: {text_file}; 256 tokens; calibrated on: {text_file}")
    said = texts_of(tmp_path / "out")
    assert said["calibrated_on"].startswith("domains (Python") and said["measured_on"] == "nothing"
    manifest = json.loads((tmp_path / "out/prism.json").read_text())
    assert manifest["options"]["calibration"]["text"] == "domains"
