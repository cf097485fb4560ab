"""generate: text as it is made, prompts from a pipe or a terminal, conversations, and any checkpoint."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from moe_prism import cli

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
FEW = ("--max-tokens", "4")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments, typed=None, piped=None):
        capsys.readouterr()
        if typed is not None or piped is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(piped) if typed is None else Terminal(typed))
        code = cli.main(["generate", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def talking(tmp_path_factory, elastic_tiny):
    """The tiny elastic model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "talking"
    shutil.copytree(elastic_tiny, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_the_text_arrives_in_pieces_and_is_that_of_json(run, elastic_tiny, monkeypatch):
    pieces = []
    whole = json.loads(run(elastic_tiny, "--prompt", "import", *FEW, "--json")[1])
    monkeypatch.setattr("moe_prism.cli.generate._write", pieces.append)
    assert run(elastic_tiny, "--prompt", "import", *FEW)[0] == 0
    assert pieces[0].startswith("import") and "".join(pieces) == whole["prompt"] + whole["text"] + "\n" and len(pieces) > 3


def test_a_prompt_may_be_piped_in(run, elastic_tiny):
    code, out, _ = run(elastic_tiny, *FEW, piped="import os\n")
    assert code == 0 and out.startswith("import os")
    code, _, err = run(elastic_tiny, *FEW, piped="")
    assert code == 2 and "prompt is empty" in err


def test_prompts_are_asked_for_at_a_terminal(run, elastic_tiny):
    code, out, err = run(elastic_tiny, *FEW, typed="import os\n\ndef f\n/exit\nnever\n")
    assert code == 0 and "import os" in out and "def f" in out and "never" not in out and err.count("tokens/s") == 2
    code, _, err = run(elastic_tiny, "--json", typed="x\n")
    assert code == 2 and "--json makes one object of one prompt" in err


def test_a_conversation_remembers_its_turns(run, talking, monkeypatch):
    asked = []
    import moe_prism.jobs.generate as job

    real = job.generate
    monkeypatch.setattr(job, "generate", lambda *a, **k: asked.append(a[2]) or real(*a, **k))
    code, out, _ = run(talking, "--chat", *FEW, typed="hello\nmore\n")
    assert code == 0 and "hello" not in out
    first = out.splitlines()[0]
    assert (
        asked[0] == "<user>hello<assistant>"
        and asked[1].startswith("<user>hello<assistant>")
        and asked[1].endswith("<user>more<assistant>")
    )
    assert first.strip() in asked[1]


def test_a_model_without_a_template_has_no_conversation(run, elastic_tiny):
    code, _, err = run(elastic_tiny, "--chat", "--prompt", "x", *FEW)
    assert code == 2 and "has no chat template" in err and err.count("\n") == 1


def test_it_decodes_in_another_way(run, elastic_tiny, tmp_path):
    """By the option, and by the file of a point; a verifier is a function of a file."""
    ask = (elastic_tiny, "--prompt", "import os", "--max-tokens", "6", "--json")
    plain = json.loads(run(*ask)[1])
    found = json.loads(run(*ask, "--decode", "self-draft:budget=0.5:length=2:adapt=false")[1])
    assert found["text"] == plain["text"] and found["decoding"]["drafted"] > 0 and "decoding" not in plain
    (tmp_path / "point.json").write_text(
        json.dumps({"kind": "operating point", "name": "mine", "point": found["point"], "made": {}})
    )
    assert json.loads(run(*ask, "--point", tmp_path / "point.json")[1])["decoding"]["drafted"] == found["decoding"]["drafted"]
    (tmp_path / "mine.py").write_text("def best(prompt, text):\n    return len(text)\n")
    hot = ("--temperature", "1", "--decode", "des:beams=3:keep=1", "--verifier", f"{tmp_path / 'mine.py'}:best")
    assert json.loads(run(*ask, *hot)[1])["decoding"]["written"] > 6
    assert json.loads(run(*ask, "--kv-entries", "64")[1])["text"] == plain["text"]


def test_any_checkpoint_generates_at_full_price(run, tiny_source):
    found = json.loads(run(tiny_source, "--prompt", "import", *FEW, "--json")[1])
    assert found["budget"] == 1 and found["tokens"] >= 1
    code, _, err = run(tiny_source, "--prompt", "import", "--budget", "0.5")
    assert code == 2 and err.count("\n") == 1
