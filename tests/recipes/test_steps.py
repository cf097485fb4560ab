"""nano-steps: problems, traces and their checker."""

import importlib
import json
import random
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "nano-steps"))
    return importlib.import_module("steps")


def test_a_trace_is_right_in_every_line_and_ends_with_the_answer(steps):
    chance = random.Random(0)
    for problem in [*steps.problems(300, 5, held_out=False), *steps.problems(50, 5, False, *steps.LONGER)]:
        text = problem.trace(chance)[len(problem.prompt) :]
        assert steps.is_right(problem, text) and steps.right_steps(problem, text) == 1
        assert steps.read(problem.prompt) == problem
        value = problem.start
        for (sign, n), line in zip(problem.operations, text.splitlines(), strict=False):
            assert int(line[1:3]) == value
            value = eval(f"({value} {sign} {n}) % 100")
            assert int(line[-2:]) == value
        assert text.endswith(f"A{value:02}\n")


def test_a_wrong_digit_is_found(steps):
    (problem,) = steps.problems(1, 3, held_out=True)
    lines = [problem.line(i) for i in range(len(problem.operations))]
    wrong = lines[0][:-3] + f"{(problem.values[0] + 1) % 100:02}\n"
    assert steps.right_steps(problem, wrong + lines[1]) == 0.5
    assert steps.right_steps(problem, "what\n") == 0 and steps.right_steps(problem, lines[0][:4]) == 1
    assert not steps.is_right(problem, f"A{(problem.values[-1] + 1) % 100:02}\n") and steps.answer("nothing") is None
    assert steps.verifier(problem.prompt, "".join(lines)) == 1
    with pytest.raises(ValueError, match="follow each other"):
        steps.read("Q10a+01c+01")
    with pytest.raises(ValueError, match="looks like"):
        steps.read("2 + 2")


def test_held_out_questions_are_in_no_training_text(steps):
    held, trained = (steps.problems(400, 1, held_out=side) for side in (True, False))
    assert not {p.prompt for p in held} & {p.prompt for p in trained}
    assert all(p.is_held_out for p in held) and len({p.prompt for p in held}) == 400


def test_every_character_is_a_token_and_files_are_written(steps, tmp_path, monkeypatch):
    data = importlib.import_module("data")
    assert data.__file__.startswith(str(RECIPES))
    made = data.tokenizer()
    (problem,) = steps.problems(1, 3, held_out=False)
    text = problem.trace(random.Random(1))
    assert made.decode(made.encode(text).ids) == text and len(made.encode(text).ids) == len(text)
    monkeypatch.setattr("sys.argv", ["data.py", "--out", str(tmp_path), "--problems", "50"])
    data.main()
    assert json.loads((tmp_path / "data.json").read_text())["train"]["problems"] == 50
    assert (tmp_path / "train.bin").stat().st_size > 5000 and len((tmp_path / "problems.txt").read_text().splitlines()) == 2000
