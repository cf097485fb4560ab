"""Any folder that transformers loads is served: plain, pruned and dense, at points of fewer experts."""

from __future__ import annotations

import httpx2
import pytest

from moe_prism import cli
from moe_prism.errors import UsageError
from moe_prism.serve.server import check_folder
from tests.serve.house import open_house

BODY = {"prompt": "import os", "max_tokens": 3, "temperature": 0}


def served(folder):
    """(names of the levels, answer at each), of a server that is asked for every level by name."""
    with open_house(folder) as house, httpx2.Client(base_url=house.root, timeout=60) as web:
        names = [level.name for level in house.built.service.ladder.levels]
        name = house.built.service.name
        answers = [web.post("/v1/completions", json={**BODY, "model": f"{name}@{each}"}).json() for each in names]
        home = web.get("/", follow_redirects=False)
        assert home.status_code == 307 and home.headers["location"] == "/status"
    return names, answers


def test_a_plain_folder_is_served_at_fewer_experts(tiny_source):
    names, answers = served(tiny_source)
    assert names[-1] == "full" and set(names) <= {"top-1", "full"}
    assert [a["moe_prism"]["point"] for a in answers] == names
    assert not (tiny_source / "ladder.json").exists()


@pytest.mark.slow
def test_a_pruned_folder_and_a_dense_model_are_served(tiny_source, tiny_dense, text_file, tmp_path):
    pruned = ["prune", str(tiny_source), "-o", str(tmp_path / "half"), "--criterion", "soft-count", "--keep", "0.5"]
    assert cli.main([*pruned, "--text", str(text_file), "--tokens", "256", "--length", "32"]) == 0
    assert served(tmp_path / "half")[0][-1] == "full"
    assert served(tiny_dense)[0] == ["full"]


def test_what_is_no_model_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError):
            check_folder(folder)
