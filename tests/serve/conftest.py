from __future__ import annotations

import shutil

import pytest

pytest.importorskip("fastapi")

from tests.serve.house import TEMPLATE, open_house, with_levels


@pytest.fixture(scope="session")
def tiny_levels(shared, elastic_tiny):
    """The tiny elastic model with three operating points."""
    return shared("elastic-tiny-levels", lambda folder: with_levels(elastic_tiny, folder))


@pytest.fixture(scope="session")
def tiny_chat(shared, tiny_levels):
    """The same with a chat template that takes tools and two variables."""

    def make(folder):
        shutil.copytree(tiny_levels, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    return shared("elastic-tiny-chat", make)


@pytest.fixture(scope="module")
def house(tiny_levels):
    """A server for the tests of one file; they leave nothing behind in it."""
    with open_house(tiny_levels) as found:
        yield found


@pytest.fixture(scope="module")
def chat_house(tiny_chat):
    """The same with a chat template."""
    with open_house(tiny_chat) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """After every test that used the shared server, it holds nothing."""
    yield
    for name in ("house", "chat_house"):
        if name in request.fixturenames:
            assert request.getfixturevalue(name).idle() == []


@pytest.fixture
def pair():
    """A cheap model with two levels, one of our own servers, and a dear one of somebody else's."""
    from tests.serve.pool_house import LEVELS, Fake, fakes, listed  # needs the extra `serve`

    small, large = Fake(listed("s", LEVELS), text="small"), Fake(listed("l"), text="large")
    with fakes(small, large):
        yield small, large
