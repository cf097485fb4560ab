"""Syntax: Python functions of the held-out text, continued, must still parse."""

from __future__ import annotations

import ast
import codeop
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from .base import Material, NoQuestionsError, Slice, batches, greedy, spread

PROMPT = 48
NEW = 64
MOST = 48
INCOMPLETE: int = codeop.PyCF_ALLOW_INCOMPLETE_INPUT  # type: ignore[attr-defined]  # what the interactive console asks with
_BEGINS = re.compile(r"^[ \t]*(?:async )?(?:def|class) \w", re.MULTILINE)


class Syntax(Slice):
    """Functions and classes of the text, moved to the left margin: 48 tokens of each, continued by 64 greedy ones.

    Right is what the parser takes up to the last whole line, where an end in the middle of a statement is no mistake. A group is a window.
    """

    name = "syntax"

    def __init__(self, material: Material) -> None:
        self.tokenizer = material.tokenizer
        found = [(n, ids) for n, row in enumerate(material.ids.tolist()) for ids in self._prompts(row)]
        if not found:
            raise NoQuestionsError("the text has no functions or classes of Python")
        chosen = spread(found, MOST)
        self.prompts, self.groups = torch.tensor([ids for _, ids in chosen]), torch.tensor([n for n, _ in chosen])

    def verdicts(self, model: Any) -> Tensor:
        made = [greedy(model, rows, NEW) for rows in batches(self.prompts, NEW)]
        every = torch.cat([self.prompts, torch.cat(made)], 1).tolist()
        return torch.tensor([float(self._is_right(row)) for row in every], dtype=torch.float64)

    def _prompts(self, row: list[int]) -> list[list[int]]:
        """The first tokens of every function and class of a window that Python can read so far."""
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        found = []
        for match in _BEGINS.finditer(text):
            ids = self.tokenizer(_own_lines(text[match.start() :]), add_special_tokens=False, verbose=False)["input_ids"][:PROMPT]
            if len(ids) == PROMPT and reads(whole_lines(self.tokenizer.decode(ids))):
                found.append(ids)
        return found

    def _is_right(self, row: list[int]) -> bool:
        """Whether what was written holds a whole line, and can be read to the last of them."""
        start, text = self.tokenizer.decode(row[:PROMPT]), whole_lines(self.tokenizer.decode(row))
        return len(text) > len(start) and reads(text)


def _own_lines(text: str) -> str:
    """A text that begins with an indented line, moved to the left by that indentation as far as its lines have it."""
    first = text[: len(text) - len(text.lstrip())]
    return "\n".join(line.removeprefix(first) for line in text.split("\n"))


def whole_lines(text: str) -> str:
    """Without the last line, which has no end yet."""
    return text[: text.rfind("\n") + 1]


def reads(text: str) -> bool:
    """Whether `ast.parse` takes a text, or would take it with more behind it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return _lacks_an_end(text)
    return True


def _lacks_an_end(text: str) -> bool:
    try:
        compile(text, "text", "exec", ast.PyCF_ONLY_AST | INCOMPLETE)
    except SyntaxError as error:
        return "incomplete input" in str(error)
    except (ValueError, MemoryError, RecursionError):
        return False
    return True
