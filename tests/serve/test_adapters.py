"""Fine-tunes behind one server: requests name them, batches mix them, administrators load and unload them."""

from __future__ import annotations

import json
import shutil
import threading
import time

import httpx2
import pytest
import torch

from moe_prism import cli
from moe_prism.artefact.open import open_to_write
from moe_prism.errors import UsageError
from moe_prism.options.serve import ServeOptions
from moe_prism.serve.engine.scheduler import with_salt
from moe_prism.serve.engine.start import load_adapters
from moe_prism.serve.keys import admin_keys
from tests.adapters.tuned import three
from tests.serve.house import SMALL, open_house

PROMPT = "def main(args):\n    return "
ADMIN = {"authorization": "Bearer admin"}
CLIENT = {"authorization": "Bearer client"}
NEW = 8


@pytest.fixture(scope="module")
def tuned(shared, elastic_tiny):
    return shared("elastic-tiny-adapters", lambda folder: three(elastic_tiny, folder))


@pytest.fixture(scope="module")
def shelf(tuned, tmp_path_factory):
    """A folder of adapters with a file of administrators' keys beside it."""
    folder = tmp_path_factory.mktemp("shelf")
    for i in range(3):
        shutil.copytree(tuned / f"a{i}", folder / f"a{i}")
    (folder / "broken").mkdir()
    (folder.parent / f"{folder.name}.keys").write_text("admin\n")
    return folder


def options(tuned, shelf):
    keys = shelf.parent / f"{shelf.name}.keys"
    return {"adapters": [f"first={tuned / 'a0'}"], "adapter_folder": shelf, "admin_key_file": keys, "api_key": "client"}


@pytest.fixture(scope="module")
def server(tiny_levels, tuned, shelf):
    with open_house(tiny_levels, **options(tuned, shelf)) as house:
        yield house


@pytest.fixture
def web(server):
    with httpx2.Client(base_url=server.root, timeout=60, headers=CLIENT) as client:
        yield client
        for own in client.get("/admin/adapters", headers=ADMIN).json()["adapters"]:
            if own["name"] != "first":
                client.delete(f"/admin/adapters/{own['name']}", headers=ADMIN)
        assert server.idle() == []


def answer(web, model, prompt=PROMPT, **more):
    body = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "quality": "full", "return_token_ids": True}
    return web.post("/v1/completions", json={**body, **more})


def tokens(web, model, prompt=PROMPT, **more):
    made = answer(web, model, prompt, **more)
    assert made.status_code == 200, made.text
    return made.json()["choices"][0]["token_ids"]


def by_itself(folder, prompt=PROMPT):
    """What the merged checkpoint generates in transformers' own loop."""
    model, tokenizer = open_to_write(folder)
    rows = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        return model.generate(**rows, max_new_tokens=NEW, do_sample=False)[0, rows.input_ids.shape[1] :].tolist()


def test_three_adapters_in_one_batch_give_the_tokens_of_their_merged_models(web, tuned, tiny_levels):
    for i in (1, 2):
        assert web.put(f"/admin/adapters/a{i}", headers=ADMIN).status_code == 201
    wanted = {"tiny:first": tuned / "t0", "tiny:a1": tuned / "t1", "tiny:a2": tuned / "t2", "tiny": tiny_levels}
    expected = {model: by_itself(folder) for model, folder in wanted.items()}
    assert len({tuple(t) for t in expected.values()}) == 4
    found = {}

    def ask(model):
        found[model] = tokens(web, model)

    threads = [threading.Thread(target=ask, args=(model,)) for model in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_models_are_listed_and_a_quality_may_stand_behind_an_adapter(web):
    names = {own["id"]: own for own in web.get("/v1/models").json()["data"]}
    assert names["tiny:first"]["parent"] == "tiny" and names["tiny"]["parent"] is None
    assert names["tiny:first"]["adapter"]["experts"] == 3 and names["tiny:first"]["adapter"]["bytes"] > 0
    assert web.get("/v1/models/tiny:first").json()["id"] == "tiny:first"
    made = answer(web, "tiny:first@half", quality=None).json()
    assert made["model"] == "tiny:first" and made["moe_prism"]["point"] == "half"
    refused = answer(web, "tiny:none")
    assert refused.status_code == 404 and "tiny:ADAPTER' with one of: first" in refused.json()["error"]["message"]
    assert web.get("/v1/models/tiny:none").status_code == 404
    assert answer(web, "tiny:first@half").status_code == 400  # the quality is there twice


def test_prefixes_of_one_adapter_are_not_those_of_another(web, server, tuned):
    """The same long prompt, again and again: a prefix that was found where it does not belong would change the tokens."""
    prompt = "import os\nimport sys\n" * 6
    assert web.put("/admin/adapters/a2", headers=ADMIN).status_code == 201
    models = {"tiny": server.folder, "tiny:first": tuned / "t0", "tiny:a2": tuned / "t2"}
    expected = {model: by_itself(folder, prompt) for model, folder in models.items()}
    for _ in range(2):
        for model in models:
            assert tokens(web, model, prompt) == expected[model]
    hits = answer(web, "tiny:a2", prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert hits > 0  # its own


def test_salts_of_adapters_are_their_own():
    row = list(range(64))
    made = [with_salt(salt, row, adapter) for salt in ("", "a") for adapter in ("", "a", "b")]
    assert made[0] == row and len({tuple(m) for m in made}) == 6


def test_an_adapter_leaves_and_may_come_back_with_other_weights(web, shelf, tuned):
    assert web.put("/admin/adapters/a1", headers=ADMIN).status_code == 201
    before = tokens(web, "tiny:a1")
    first = tokens(web, "tiny:first")
    loaded = web.get("/admin/adapters", headers=ADMIN).json()
    assert {own["name"] for own in loaded["adapters"]} == {"first", "a1"}
    assert web.delete("/admin/adapters/a1", headers=ADMIN).json() == {"name": "a1", "unloaded": True}
    assert answer(web, "tiny:a1").status_code == 404 and tokens(web, "tiny:first") == first
    left = web.get("/admin/adapters", headers=ADMIN).json()
    assert left["bytes"] < loaded["bytes"]
    moved = shelf / "a1-old"
    (shelf / "a1").rename(moved)
    shutil.copytree(tuned / "a2", shelf / "a1")
    try:
        assert web.put("/admin/adapters/a1", headers=ADMIN).status_code == 201
        assert tokens(web, "tiny:a1") == by_itself(tuned / "t2") != before  # nothing of the old one's prefixes is found
    finally:
        shutil.rmtree(shelf / "a1")
        moved.rename(shelf / "a1")


def test_an_adapter_waits_for_its_requests_and_takes_no_new_ones(web, server):
    assert web.put("/admin/adapters/a1", headers=ADMIN).status_code == 201
    done = []
    asked = threading.Thread(target=lambda: done.append(tokens(web, "tiny:a1", max_tokens=100, ignore_eos=True)))
    asked.start()
    until = time.monotonic() + 20
    while not server.built.service.engine.book and time.monotonic() < until:
        time.sleep(0.001)
    gone = web.delete("/admin/adapters/a1", headers=ADMIN)
    asked.join()
    assert gone.status_code == 200 and len(done[0]) == 100


@pytest.mark.parametrize("headers", [{}, CLIENT, {"authorization": "Bearer wrong"}])
@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("PUT", "/a1"), ("DELETE", "/first"), ("GET", "/"), ("PUT", "/a1/")])
def test_only_an_administrators_key_opens_the_routes(server, headers, method, path):
    with httpx2.Client(base_url=server.root) as client:
        assert client.request(method, f"/admin/adapters{path}", headers=headers).status_code == 401
    assert list(server.built.service.engine.adapters) == ["first"]


def test_an_administrators_key_is_no_clients_key(server):
    with httpx2.Client(base_url=server.root, headers=ADMIN) as client:
        assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("..", 404, ""),
        ("%2e%2e", 400, "no name of an adapter"),
        ("..%2fa0", 404, ""),
        ("none", 404, "has no 'none'"),
        (".hidden", 400, "no name of an adapter"),
        ("x" * 65, 400, "no name of an adapter"),
        ("a:b", 400, "no name of an adapter"),
        ("broken", 409, "has no adapter.json"),
    ],
)
def test_what_cannot_be_loaded_is_refused(web, name, status, says):
    refused = web.put(f"/admin/adapters/{name}", headers=ADMIN)
    assert refused.status_code == status and says in refused.json()["error"]["message"]


def test_loading_twice_and_unloading_nothing_are_refused(web, shelf):
    assert web.put("/admin/adapters/a1", headers=ADMIN).status_code == 201
    assert web.put("/admin/adapters/a1", headers=ADMIN).status_code == 409
    assert web.delete("/admin/adapters/none", headers=ADMIN).status_code == 404
    (shelf / "link").symlink_to(shelf.parent)
    try:
        assert web.put("/admin/adapters/link", headers=ADMIN).status_code == 404
    finally:
        (shelf / "link").unlink()


def test_without_a_folder_there_is_nothing_to_administer(house):
    with httpx2.Client(base_url=house.root) as client:
        assert client.get("/admin/adapters").status_code == 404
        assert answer(client, "tiny:first").status_code == 404


def server_is_ready(web, restarts):
    """Whether the engine has been started again so often, and runs."""
    return f'engine_restarts_total{{model_name="tiny"}} {restarts}.0' in web.get("/metrics").text


@pytest.mark.slow
def test_an_engine_in_a_process_of_its_own_takes_adapters_and_keeps_them_over_a_restart(tiny_levels, tuned, shelf):
    config = {"engine": {**SMALL["engine"], "process": True}}
    with (
        open_house(tiny_levels, config, **options(tuned, shelf)) as house,
        httpx2.Client(base_url=house.root, timeout=60, headers=CLIENT) as web,
    ):
        assert web.put("/admin/adapters/a2", headers=ADMIN).status_code == 201
        assert web.put("/admin/adapters/broken", headers=ADMIN).status_code == 409
        assert web.put("/admin/adapters/a1", headers=ADMIN).status_code == 201
        assert web.delete("/admin/adapters/a1", headers=ADMIN).status_code == 200
        want = by_itself(tuned / "t2")
        assert tokens(web, "tiny:a2") == want and tokens(web, "tiny:first") == by_itself(tuned / "t0")
        house.built.service.engine.give_up(1)
        until = time.monotonic() + 240
        while not server_is_ready(web, restarts=1) and time.monotonic() < until:
            time.sleep(0.05)
        assert set(house.built.service.engine.adapters) == {"first", "a2"}
        assert tokens(web, "tiny:a2") == want


def test_an_adapter_whose_folder_is_gone_is_left_out_of_the_next_engine(tiny_levels, tuned, shelf):
    model, _ = open_to_write(tiny_levels)
    asked = ServeOptions(**{**options(tuned, shelf), "adapter_room": 3})
    made = load_adapters(model, tiny_levels, asked, [f"a1={shelf / 'a1'}", f"gone={shelf / 'none'}", f"more={shelf / 'a2'}"])
    assert list(made.loaded) == ["first", "a1", "more"]
    assert [own.table.room for own in made.layers] == [3 + 2, 3 + 1]  # those that came while it ran take of the room for such


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adapters": ["a"]}, "is no NAME=FOLDER"),
        ({"adapters": ["a:b=x"]}, "is no NAME=FOLDER"),
        ({"adapters": ["a=x", "a=y"]}, "names 'a' twice"),
        ({"adapter_room": 2}, "belongs to --adapter-folder"),
        ({"adapter_folder": "x"}, "only administrators load adapters"),
        ({"adapters": ["a=x"], "store": object()}, "experts in memory"),
        ({"adapters": ["a=x"], "patterns": "p", "task": "t"}, "does not go with adapters"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, says):
    with pytest.raises(UsageError, match=says):
        ServeOptions(**given).check()


def test_a_client_is_no_administrator(tmp_path):
    (tmp_path / "keys").write_text("one\n")
    with pytest.raises(UsageError, match="is a client's key too"):
        admin_keys(ServeOptions(api_key="one", admin_key_file=tmp_path / "keys", adapter_folder=tmp_path))


def test_generate_wears_an_adapter(elastic_tiny, tuned, capsys):

    asked = [
        "generate",
        str(elastic_tiny),
        "--prompt",
        PROMPT,
        "--max-tokens",
        str(NEW),
        "--json",
        "--adapter",
        str(tuned / "a0"),
    ]
    assert cli.main(asked) == 0
    worn = capsys.readouterr().out
    assert cli.main(["generate", str(tuned / "t0"), *asked[2:7]]) == 0
    merged = capsys.readouterr().out

    assert json.loads(worn)["text"] == json.loads(merged)["text"]
    assert cli.main([*asked, "--expert-memory", "1MB"]) == 2 and "experts in memory" in capsys.readouterr().err
