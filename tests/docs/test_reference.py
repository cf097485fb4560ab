"""The generated reference pages: they are fresh, and what they name exists."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from moe_prism.catalogue import REGISTRIES, methods, registry
from moe_prism.cli import build
from moe_prism.cli.listing import Kind
from moe_prism.evidence import EVIDENCE
from moe_prism.jobs.reference import COMMAND, PAGES, meanings, methods_page, parameters, published, write_pages
from moe_prism.methods.find import described, method
from moe_prism.methods.skip.uniform import Uniform
from moe_prism.model.families import installed_families
from moe_prism.registry import Entry
from moe_prism.systems import SYSTEMS
from tests.faults.rows import tier_of

ROOT = Path(__file__).parents[2]
SHELL = "moe-prism "
COMMANDS = [s.command for s in SYSTEMS if s.command.startswith(SHELL)]


def parsed(command: str) -> None:
    """Raises where the command line is not one that `moe-prism` takes; runs nothing."""
    build().parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_registries_say(name):
    file = ROOT / "docs" / "reference" / name
    stale = f"docs/reference/{name} is stale: run `{COMMAND}` and commit what it writes"
    assert file.is_file() and file.read_text("utf-8") == PAGES[name](), stale


def test_the_command_that_writes_them_exists(tmp_path):
    assert re.search(rf"^{COMMAND.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.M)
    write_pages(tmp_path / "reference")
    assert {file.name for file in (tmp_path / "reference").iterdir()} == set(PAGES)


@dataclass(frozen=True, kw_only=True)
class HalfParameters:
    """share: what stays, 0 to 1; also for shared: layers. whole: everywhere."""

    share: float = 0.5
    whole: bool = False


class Half(Uniform):
    """For this test."""

    paper = "arXiv 0000.00000"
    needs = ("patience",)
    Parameters = HalfParameters


def test_a_method_appears_by_being_registered(monkeypatch):
    assert "half" not in {row.name for row in described()}
    monkeypatch.setitem(methods._builtin, "half", Entry(f"{__name__}:Half", "half of it", acts="routing"))
    page = methods_page()
    assert "| `half` | half of it | patience | arXiv 0000.00000 | generate, serve, vLLM |" in page
    assert "| `half:SHARE` | `share` | `float` | `0.5` | what stays, 0 to 1; also for shared: layers |" in page
    assert "| `half:whole=WHOLE` | `whole` | `bool` | `False` | everywhere |" in page


def test_a_parameter_without_a_meaning_is_refused(monkeypatch):
    @dataclass(frozen=True)
    class Silent:
        """Says nothing."""

        share: float = 0.5

    assert meanings(Silent) == {}
    monkeypatch.setattr(Half, "Parameters", Silent)
    monkeypatch.setitem(methods._builtin, "half", Entry(f"{__name__}:Half", "half of it", acts="routing"))
    row = next(row for row in described() if row.name == "half")
    with pytest.raises(ValueError, match="does not say what 'share' means"):
        parameters(row)


def test_a_method_of_another_package_is_left_out(monkeypatch):
    monkeypatch.setitem(methods._builtin, "half", Entry(f"{__name__}:Half", "half of it", origin="other", acts="routing"))
    assert "`half`" not in methods_page()


def test_every_parameter_of_every_method_can_be_written_so():
    for row in described():
        for line in parameters(row):
            where = line.written.strip("`")
            assert line.name.strip("`").upper() in where or where.startswith("moe-prism skip --")
            if where.startswith(SHELL):
                parsed(f"moe-prism skip nano {where.rsplit(' ', 1)[1]} {line.default.strip('`')}")


def test_every_kind_that_is_listed_is_a_registry_or_has_a_table_of_its_own():
    assert set(get_args(Kind)) == {*REGISTRIES, "families", "methods", "systems"}


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_a_page_is_one(name):
    found = re.findall(r"`(moe-prism [^`]+)`", PAGES[name]())
    whole = [c.replace("prune:NAME", "prune:energy") for c in found if not re.fullmatch(r"moe-prism( \w+)?( --[\w-]+)?", c)]
    assert whole
    for command in whole:
        parsed(command)


def test_the_parser_refuses_what_is_no_command():
    for wrong in (
        "moe-prism prine nano",
        "moe-prism prune nano --criterion-of easy-ep",
        "moe-prism forecast nano --seconds soon",
    ):
        with pytest.raises(Exception, match=r"prine|criterion-of|soon"):
            parsed(wrong)


def test_systems_are_numbered_once_and_papers_look_like_papers():
    numbers = [system.number for system in SYSTEMS]
    assert numbers == [f"P{i}" for i in range(1, 9)] + [str(i) for i in range(1, 56)] + [f"S{i}" for i in range(1, 5)]
    assert all(re.fullmatch(r"\d{4}\.\d{5}", system.paper) for system in SYSTEMS)
    listed = [system.paper for system in SYSTEMS if system.number.isdigit()]
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.number)
def test_a_state_says_what_there_is(system):
    assert bool(system.missing) == (system.state == "in part")
    assert bool(system.command) == (system.state != "not yet")
    assert system.command or not system.uses


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.command], ids=lambda system: system.number)
def test_what_a_system_names_exists(system):
    if system.command.startswith(SHELL):
        parsed(system.command)
        for _, option, value in re.findall(r"(?=(--(method|methods|rule|criterion) (\S+)))", system.command):
            kind = {"split": "splits", "recover": "recoveries"}.get(system.command.split()[1])
            if kind is not None:
                registry(kind).get(value)
            else:
                method(f"prune:{value}" if option == "criterion" else value)
    else:
        module, _, attribute = system.command.partition(":")
        assert hasattr(import_module(module), attribute)
    for use in system.uses:
        kind, _, name = use.partition("/")
        if kind == "methods":
            method(name)
        else:
            assert name in (installed_families() if kind == "families" else registry(kind).names()), use


def test_57_of_57_systems_have_claims_with_a_verdict():
    assert published(SYSTEMS) == 57 and list(EVIDENCE) == [system.number for system in SYSTEMS]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.number)
def test_a_claim_has_a_figure_from_a_page_and_what_is_built_a_test_of_every_commit(system):
    found = EVIDENCE[system.number]
    assert found.findings and all(finding.claim and finding.figure for finding in found.findings)
    assert (ROOT / "docs" / found.page).is_file()
    assert bool(found.test) == (system.state != "not yet"), "what is built has a test, and only that"
    if found.test:
        assert tier_of(*found.test.partition("[")[0].split("::")) == "commit", found.test
    else:
        assert {finding.verdict for finding in found.findings} == {"not measured"}


def test_named_choices_of_commands_are_in_the_registry_of_their_option():
    options = {"solver": "solvers", "objective": "objectives", "gate-choice": "gates", "policy": "policies"}
    options |= {"expert-policy": "cache-policies", "protect": "protections", "collectors": "collectors"}
    found = [pair for command in COMMANDS for pair in re.findall(r"--([\w-]+) (\S+)", command) if pair[0] in options]
    assert {option for option, _ in found} == set(options)
    for option, values in found:
        assert set(values.split(",")) <= set(registry(options[option]).names()), (option, values)
