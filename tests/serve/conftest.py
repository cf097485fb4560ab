from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from tests.serve.house import open_house, with_levels


@pytest.fixture(scope="session")
def tiny_levels(shared, elastic_tiny):
    """The tiny elastic model with three operating points."""
    return shared("elastic-tiny-levels", lambda folder: with_levels(elastic_tiny, folder))


@pytest.fixture(scope="module")
def house(tiny_levels):
    """A server for the tests of one file; they leave nothing behind in it."""
    with open_house(tiny_levels) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """After every test that used the shared server, it holds nothing."""
    yield
    if "house" in request.fixturenames:
        assert request.getfixturevalue("house").idle() == []
