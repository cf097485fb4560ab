"""Every relative link of the documentation leads to a file, and where it names a heading, to that heading."""

from __future__ import annotations

import re

import pytest

from .pages import FENCE, ROOT, name, pages

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)|(?:src|href)=\"(?!https?:|mailto:)([^\"]+)\"")


def headings(text: str) -> set[str]:
    """Anchors as they are made on GitHub: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    everything = [*pages(), ROOT / "docs" / "developer" / "log.md", ROOT / "docs" / "families.md"]
    for page in everything:
        for first, second in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
            target, _, anchor = (first or second).partition("#")
            path = page.parent / target if target else page
            assert path.exists(), f"{name(page)}: {target}"
            assert not anchor or anchor in headings(path.read_text("utf-8")), f"{name(page)}: {target}#{anchor}"


def test_the_index_names_every_page():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / a).resolve() for a, _ in LINK.findall(index.read_text("utf-8"))}
    missing = [name(page) for page in (ROOT / "docs").rglob("*.md") if page != index and page.resolve() not in linked]
    assert not missing


@pytest.mark.parametrize("page", pages(), ids=name)
def test_files_named_in_code_exist(page):
    """A path in backticks that begins with a folder of the repository, or with a package of ours."""
    text = FENCE.sub("", page.read_text("utf-8"))
    found = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|txt|sh|toml))`", text)
    here = [path for path in found if path.endswith(".py") or (ROOT / path.split("/")[0]).is_dir()]
    missing = [path for path in here if not (ROOT / path).exists() and not (ROOT / "src/moe_prism" / path).exists()]
    assert not missing


def test_pages_named_in_the_code_exist():
    """An error message that says "see docs/..." must lead somewhere."""
    code = [path for folder in ("src", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py")]
    named = {(path, page) for path in code for page in re.findall(r"docs/[\w/-]+\.md", path.read_text("utf-8"))}
    assert named and not [f"{name(path)}: {page}" for path, page in sorted(named) if not (ROOT / page).is_file()]
