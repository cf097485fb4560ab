"""Every command line of the documentation fits the real command line, whether it is run or not."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import cyclopts
import pytest

from moe_prism.cli import build
from moe_prism.options.machine import OtherMachine
from moe_prism.schedule.classes import read_classes
from moe_prism.serve.config import read_config
from moe_prism.serve.route.config import PoolForm

from .pages import BLOCK, ROOT, command_lines, name, pages, spans

SHORT_OF = (cyclopts.MissingArgumentError,)
"""What a mention in a sentence may leave out: `moe-prism serve` names a command without its folder."""


@cache
def app():
    return build()


def check(words: list[str], *, mention: bool = False) -> None:
    """CycloptsError for a command, flag or value that does not exist. mention: arguments may be missing."""
    try:
        app().parse_args(words, exit_on_error=False, print_error=False)
    except SHORT_OF:
        if not mention:
            raise


def of(page: Path, program: str) -> list[list[str]]:
    """Arguments of every command of `program` in the blocks of a page; what sets variables before it is left out."""
    lines = [[w for w in words if not re.match(r"[A-Z_]+=", w)] for words in command_lines(page.read_text("utf-8"))]
    return [words[1:] for words in lines if words[:1] == [program]]


@pytest.mark.parametrize("page", pages(), ids=name)
def test_commands_are_understood(page):
    for words in of(page, "moe-prism"):
        check(words)
    for span in spans(page.read_text("utf-8")):
        if span.startswith("moe-prism ") and not re.search(r"[A-Z|]{2,}$|\.\.\.|:", span):
            check(re.findall(r"\"[^\"]*\"|\S+", span)[1:], mention=True)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_scripts_and_their_flags_exist(page):
    text = page.read_text("utf-8")
    wanted = [" ".join(["python", *words]) for program in ("python", "python3") for words in of(page, program)]
    for line in [*wanted, *spans(text)]:
        script = re.match(r"python3? (benchmarks|recipes)/(\S+\.py)(.*)", line)
        if script:
            path = ROOT / script[1] / script[2]
            assert path.is_file(), line
            code = path.read_text("utf-8")
            missing = [flag for flag in re.findall(r"(?<=\s)--[\w-]+", script[3]) if f'"{flag}"' not in code]
            assert not missing, f"{line}: {missing}"
        module = re.match(r"python3? -m ([\w.]+)", line)
        if module and module[1] not in ("pip", "venv"):
            assert importlib.util.find_spec(module[1]), line


@pytest.mark.parametrize("page", pages(), ids=name)
def test_make_targets_exist(page):
    text = page.read_text("utf-8")
    named = {words[0] for words in of(page, "make") if words} | {
        target for span in spans(text) for target in re.findall(r"^make ([\w-]+)$", span)
    }
    assert named <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


def test_configurations_are_accepted():
    import yaml

    found = 0
    for page in pages():
        for block in BLOCK.finditer(page.read_text("utf-8")):
            if block["language"] == "yaml":
                data, found = yaml.safe_load(block["body"]), found + 1
                if "upstreams" in data:
                    PoolForm.model_validate(data)
                else:
                    read_classes(data["classes"], name(page)) if set(data) == {"classes"} else read_config(data, name(page))
    assert found >= 2


def test_machines_are_understood():
    """The command line takes any text for `--for-machine`: what it says is read here."""
    lines = {name(page): [words for words in of(page, "moe-prism") if "--for-machine" in words] for page in pages()}
    for words in (words for found in lines.values() for words in found):
        check(words)
        assert "--dry-run" in words, "it is refused without"
        machine = OtherMachine.of(words[words.index("--for-machine") + 1])
        assert machine.ram
    blocks = lines["docs/how-to/bring-a-checkpoint.md"]
    assert len(blocks) >= 2 and any("--low-memory" in words for words in blocks), "where experts may lie on disk"
    said = [span for page in pages() for span in spans(page.read_text("utf-8")) if "--for-machine " in span]
    for span in said:
        OtherMachine.of(span.partition("--for-machine ")[2].split()[0])


def test_a_wrong_line_is_refused():
    for words in (
        ["refactor", "nano"],
        ["refactor", "nano", "-o", "x", "--nsub", "4"],
        ["refract"],
        ["serve", "x", "--engine", "?"],
    ):
        with pytest.raises(cyclopts.CycloptsError):
            check(words)
    check(["serve"], mention=True)
    with pytest.raises(cyclopts.CycloptsError):
        check(["serve", "--budget", "2"], mention=True)
    text = "```bash\nA=1 moe-prism ls methods | head -1  # two\nmoe-prism verify x &\n```\n"
    assert list(command_lines(text)) == [["A=1", "moe-prism", "ls", "methods"], ["head", "-1"], ["moe-prism", "verify", "x"]]
