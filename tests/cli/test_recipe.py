"""Recipes: errors that name the line and the nearest key, flags that override, and the recipe in what it made."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from moe_prism import cli
from moe_prism.cli.recipe_file import read_recipe
from moe_prism.cli.recipe_form import COMMANDS, flags, recipe_form, step_form
from moe_prism.errors import UsageError

GOOD = """\
model: nano
steps:
  - refactor:
      out: elastic
      n_sub: 4
      tokens: 256
      length: 32
      profile_tokens: 0
  - frontier:
      compare: [threshold]
      per_method: 2
      tokens: 256
      length: 32
"""


@pytest.fixture
def write(tmp_path):
    def call(text):
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return call


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("n_sub: 4", "n_sbu: 4", "r.yaml:5: refactor has no 'n_sbu'; did you mean 'n_sub'?"),
        ("n_sub: 4", "n_sub: four", "r.yaml:5: refactor n_sub: input should be a valid integer"),
        ("n_sub: 4", "n_sub: 0", "r.yaml:5: refactor n_sub: input should be greater than or equal to"),
        ("out: elastic", "low_memory: true", "r.yaml:3: refactor lacks 'out'"),
        ("- refactor:", "- refactr:", "r.yaml:3: no step 'refactr'; did you mean 'refactor'?"),
        ("model: nano", "modle: nano", "r.yaml:1: a recipe has no 'modle'; did you mean 'model'?"),
        ("model: nano\n", "", "r.yaml:1: the recipe lacks 'model'"),
        ("model: nano", "model: nano\nmodle: x", "r.yaml:2: a recipe has no 'modle'; did you mean 'model'?"),
        ("length: 32\n      profile", "length: 32\n      length: 64\n      profile", "r.yaml:8: 'length' stands there twice"),
        ("[threshold]", "*threshold", "r.yaml:10: no YAML"),
        ("[threshold]", "[threshold", "no YAML"),
        ("tokens: 256", "tokens: &a 256\n      memory_mib: *a", "an alias, which no such file has"),
        ("model: nano", "model: nano\ndtype: bf17", "r.yaml:2: dtype: input should be"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(write, old, new, said):
    assert old in GOOD
    with pytest.raises(UsageError) as found:
        read_recipe(write(GOOD.replace(old, new, 1)))
    assert said in f"{found.value.cause}; {found.value.next_step}" and "\n" not in str(found.value)


@pytest.mark.parametrize(
    "text", ["", "- 1", "model: nano", "model: nano\nsteps: []", "model: nano\nsteps: [1]", "{a: {b: {", "\x00", "? [a]\n: b"]
)
def test_what_is_no_recipe_is_refused(write, text):
    with pytest.raises(UsageError):
        read_recipe(write(text))


def test_a_wrong_key_needs_no_torch(write):
    script = "import sys; from moe_prism.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    wrong = write(GOOD.replace("n_sub", "n_sbu"))
    for words, code in ((["run", wrong], 2), (["recipe", "validate", wrong], 2), (["recipe", "schema"], 0)):
        done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.stdout.strip().endswith(f"{code} False"), done.stderr


def test_every_flag_of_a_command_can_be_said(write):
    """And its default, said in a recipe, makes no word of the command line."""
    for command in COMMANDS:
        form = step_form(command)
        assert {"model"} <= set(form.model_fields) and set(flags(command)) < set(form.model_fields)
        given = {"out": "x"} if "out" in form.model_fields else {}
        given |= {"tasks": ["arc_easy"]} if command == "eval" else {}
        data = {"model": "nano", "steps": [{command: form.model_validate(given).model_dump(mode="json", exclude_none=True)}]}
        assert read_recipe(write(yaml.safe_dump(data)))
    json.dumps(recipe_form().model_json_schema())


def test_flags_override_the_file(write):
    read = read_recipe(write(GOOD), ["refactor.n_sub=8", "2.frontier.tokens=512", "dtype=bf16"], "other").model_dump(
        exclude_none=True
    )
    refactor, frontier = read["steps"][0]["refactor"], read["steps"][1]["frontier"]
    assert (read["model"], read["dtype"], refactor["n_sub"], refactor["tokens"], frontier["tokens"]) == (
        "other",
        "bf16",
        8,
        256,
        512,
    )
    for change, said in (
        ("n_sub", "is not KEY=VALUE"),
        ("prune.keep=1", "has 0 such steps"),
        ("refactor.n_sbu=8", "did you mean 'n_sub'?"),
        ("3.frontier.tokens=1", "name one: 2.frontier"),
    ):
        with pytest.raises(UsageError) as found:
            read_recipe(write(GOOD), [change])
        assert said in str(found.value) + found.value.next_step


def test_the_commands_are_those_of_the_recipe(write, capsys):
    assert cli.main(["run", str(write(GOOD)), "--dry-run", "--set", "follow_links=true", "--set", "dtype=bf16"]) == 0
    assert [sorted(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        sorted(line.split())
        for line in (
            "moe-prism refactor nano --out elastic --tokens 256 --length 32 --profile-tokens 0 --follow-links --compute-dtype bf16",
            "moe-prism frontier elastic --compare threshold --per-method 2 --tokens 256 --length 32 --follow-links --dtype bf16",
        )
    ]


def test_a_recipe_runs_and_is_on_record(write, tiny_source, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(GOOD)
    words = ["--model", str(tiny_source), "--set", f"refactor.text={text_file}", "--set", f"frontier.text={text_file}"]
    assert cli.main(["run", str(path), *words, "--json"]) == 0, capsys.readouterr().err
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["n_sub"] == 4 and second["points"]
    recorded = json.loads((tmp_path / "elastic/prism.json").read_text())["recipe"]
    assert recorded["steps"][0]["refactor"]["seed"] == 0 and recorded["model"] == str(tiny_source)
    assert json.loads((tmp_path / "elastic/frontier.json").read_text())["provenance"]["recipe"] == recorded
    assert cli.main(["verify", str(tmp_path / "elastic")]) == 0
    assert cli.main(["run", str(path), *words]) == 2 and "--force" in capsys.readouterr().err
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recorded))
    assert cli.main(["recipe", "validate", str(tmp_path / "again.yaml")]) == 0
    assert cli.main(["run", str(path), *words, "--resume"]) == 0


def test_names_are_checked_before_the_first_step_runs(write, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(["run", str(write(GOOD.replace("[threshold]", "[threshold]\n      text_field: []\n      points: ['3']")))]) == 2
    )
    assert "--per-method 3" in capsys.readouterr().err and not (tmp_path / "elastic").exists()
