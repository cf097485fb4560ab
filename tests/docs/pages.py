"""What the tests of this folder read: the pages, their code blocks, and the command lines inside them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("bash", "console", "python")
BLOCK = re.compile(
    r"(?:<!--\s*not run:\s*(?P<reason>.*?)\s*-->\s*)?^```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```\s*$", re.S | re.M
)
FENCE = re.compile(r"^```.*?^```\s*$", re.S | re.M)
SPAN = re.compile(r"`([^`]+)`")
ELSEWHERE = re.compile(
    r"^(make|git clone|cd moe-prism|source .venv/bin/activate|(python3? -m )?pip install|python3? benchmarks/)\b"
)
SEPARATORS = {"|", "&", "&&", "||", ";"}
BESIDE_DOCS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")


def pages() -> list[Path]:
    """Every page written by hand: the log is a diary, and families.md is written by a program."""
    written = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in ("log.md", "families.md")]
    return [ROOT / name for name in BESIDE_DOCS] + written


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    reason: str | None  # why it is not run

    @property
    def lines(self) -> list[str]:
        """The shell lines: prompts and expected output taken off a console block, continued lines joined."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console" and any(line.startswith("$ ") for line in lines):  # without prompts all lines are commands
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return lines

    @property
    def commands(self) -> str:
        """The lines to run: set-up of the repository is left out, and its benchmarks, which take minutes to hours."""
        return "\n".join(line for line in self.lines if not ELSEWHERE.match(line.strip()))


def blocks(text: str) -> list[Block]:
    found = [Block(m["language"], m["body"], m["reason"]) for m in BLOCK.finditer(text)]
    return [block for block in found if block.language in LANGUAGES]


def sections(text: str) -> dict[str, str]:
    """The parts of a page by their heading of the second level; what stands before the first is ''."""
    parts, heading, is_code = {"": ""}, "", False
    for line in text.splitlines(keepends=True):
        is_code ^= line.startswith("```")
        if line.startswith("## ") and not is_code:
            heading = line[3:].strip()
        parts[heading] = parts.get(heading, "") + line
    return parts


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every simple command in the shell blocks of a page, run or not: pipes are taken apart, comments dropped."""
    for block in blocks(text):
        if block.language == "python":
            continue
        for line in block.lines:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word not in SEPARATORS:
                    words.append(word)
                elif words:
                    yield words
                    words = []


def spans(text: str) -> list[str]:
    """Inline code outside of the blocks, on one line each."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text))]
