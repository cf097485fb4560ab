"""Chains of arithmetic in steps, whose answers are checked exactly.

A problem starts from a number and applies labelled operations, all modulo 100 and with two digits. Labels follow each other in the
alphabet, from any letter. A trace works them out one line each, may check some of the hard ones once more, and ends with the answer:

    Q37a+58b*4c-29
    a37+58=95
    b95*4=80
    c80-29=51
    ?b95*4=80
    A51
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

LABELS = "abcdefghijkl"
LEAST, MOST = 3, 6  # operations of a problem
LONGER = 8, 10  # of those that are longer than any in training
END = "<|endoftext|>"
SYMBOLS = ("\n", *"0123456789+-*=QA?", *LABELS)
ANSWER = re.compile(r"^A(\d\d)$", re.MULTILINE)
STEP = re.compile(rf"^\??([{LABELS}])(\d\d)([-+*])(\d{{1,2}})=(\d\d)$")


@dataclass(frozen=True)
class Problem:
    """start: 0 to 99; operations: (sign, number) in order, two digits behind + and -, one from 2 to 9 behind *; first: label's number."""

    start: int
    operations: tuple[tuple[str, int], ...]
    first: int = 0

    @property
    def labels(self) -> str:
        """Of the operations."""
        return LABELS[self.first : self.first + len(self.operations)]

    @property
    def prompt(self) -> str:
        """The question with its line end."""
        asked = (f"{label}{sign}{written(sign, n)}" for label, (sign, n) in zip(self.labels, self.operations, strict=True))
        return f"Q{self.start:02}{''.join(asked)}\n"

    @property
    def values(self) -> list[int]:
        """What every operation gives."""
        found, value = [], self.start
        for sign, n in self.operations:
            value = applied(value, sign, n)
            found.append(value)
        return found

    @property
    def is_held_out(self) -> bool:
        """A tenth of all problems, by the hash of the question: no training text has them."""
        return int(hashlib.md5(self.prompt.encode(), usedforsecurity=False).hexdigest(), 16) % 10 == 0

    def line(self, i: int) -> str:
        """Step i, worked out."""
        before = self.start if i == 0 else self.values[i - 1]
        sign, n = self.operations[i]
        return f"{self.labels[i]}{before:02}{sign}{written(sign, n)}={self.values[i]:02}\n"

    def is_hard(self, i: int) -> bool:
        """Whether step i multiplies or carries."""
        before = self.start if i == 0 else self.values[i - 1]
        sign, n = self.operations[i]
        if sign == "*":
            return True
        return before % 10 + n % 10 > 9 if sign == "+" else before % 10 < n % 10

    def trace(self, chance: random.Random) -> str:
        """The prompt and its work: every step, checks of a random number of the hard ones, the answer."""
        lines = [self.line(i) for i in range(len(self.operations))]
        hard = [i for i in range(len(lines)) if self.is_hard(i)]
        checked = sorted(chance.sample(hard, chance.randint(0, len(hard))))
        checks = ["?" + lines[i] for i in checked]
        return self.prompt + "".join(lines + checks) + f"A{self.values[-1]:02}\n"


def applied(value: int, sign: str, n: int) -> int:
    """One operation modulo 100."""
    return {"+": value + n, "-": value - n, "*": value * n}[sign] % 100


def written(sign: str, n: int) -> str:
    """The number behind a sign."""
    return str(n) if sign == "*" else f"{n:02}"


def drawn(chance: random.Random, least: int = LEAST, most: int = MOST) -> Problem:
    """A problem of so many operations."""
    operations = []
    for _ in range(chance.randint(least, most)):
        sign = chance.choice("+-*")
        operations.append((sign, chance.randint(2, 9) if sign == "*" else chance.randint(0, 99)))
    return Problem(chance.randint(0, 99), tuple(operations), chance.randint(0, len(LABELS) - len(operations)))


def problems(count: int, seed: int, held_out: bool, least: int = LEAST, most: int = MOST) -> list[Problem]:
    """Different problems of one side of the split."""
    chance = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = drawn(chance, least, most)
        if problem.is_held_out == held_out:
            found.setdefault(problem.prompt, problem)
    return list(found.values())


def read(prompt: str) -> Problem:
    """The problem of a prompt. ValueError if it is none."""
    match = re.fullmatch(rf"Q(\d\d)((?:[{LABELS}][-+*]\d{{1,2}})+)\n?", prompt)
    if match is None:
        raise ValueError("a question looks like Q37a+58b*4c-29")
    found = re.findall(rf"([{LABELS}])([-+*])(\d{{1,2}})", match[2])
    made = Problem(int(match[1]), tuple((sign, int(n)) for _, sign, n in found), LABELS.index(found[0][0]))
    if made.labels != "".join(label for label, _, _ in found):
        raise ValueError("labels follow each other in the alphabet")
    return made


def answer(text: str) -> int | None:
    """The first answer in what a model wrote; None if there is none."""
    found = ANSWER.search(text)
    return None if found is None else int(found[1])


def is_right(problem: Problem, text: str) -> bool:
    """The exact checker: whether the answer is the problem's."""
    return answer(text) == problem.values[-1]


def right_steps(problem: Problem, text: str) -> float:
    """The exact verifier of a partial trace: share of its finished lines that are right; 1 for none."""
    lines = [line for line in text.split("\n")[:-1] if line]
    good = 0
    for line in lines:
        step, done = STEP.match(line), ANSWER.match(line)
        if step is not None and step[1] in problem.labels:
            good += line.lstrip("?") + "\n" == problem.line(problem.labels.index(step[1]))
        elif done is not None:
            good += int(done[1]) == problem.values[-1]
    return good / len(lines) if lines else 1.0


def verifier(prompt: str, text: str) -> float:
    """`moe-prism generate --verifier recipes/nano-steps/steps.py:verifier`."""
    return right_steps(read(prompt), text)
