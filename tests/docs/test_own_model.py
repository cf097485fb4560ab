"""The tutorial "your own model", followed by somebody who knows nothing else, with five kinds of models: eight tasks of eight for each."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil

import httpx2
import pytest
import torch
from huggingface_hub import constants

from moe_prism import cli
from tests.checkpoint.quantized import quantize
from tests.jobs.gguf_files import write_gguf
from tests.model.test_hub import MAIN, NAME, put_in_cache
from tests.serve.house import open_house
from tests.tiny_sources import save_tiny

from .pages import ROOT, sections
from .pages import blocks as code_blocks

PAGE = (ROOT / "docs/tutorials/my-own-model.md").read_text("utf-8")
TASKS = ("1", "2", "3", "4", "5", "6", "7", "8")
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
FEWER = {
    "refactor": ("--tokens", "512", "--length", "64", "--profile-tokens", "256"),
    "frontier": ("--tokens", "256", "--length", "64", "--per-method", "3"),
    "generate": ("--max-tokens", "4"),
}


def commands():
    """task -> the words of its commands."""
    found = {}
    for heading, text in sections(PAGE).items():
        lines = [shlex.split(line) for block in code_blocks(text) for line in block.lines]
        found[heading[:1]] = [words[1:] for words in lines if words[:1] == ["moe-prism"]]
    return {task: found[task] for task in TASKS}


def hub_name(folder, monkeypatch):
    save_tiny("olmoe", folder / "source", dtype=torch.bfloat16)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    put_in_cache(folder / "hub", folder / "source", MAIN)
    return NAME


def sharded(folder, monkeypatch):
    save_tiny("qwen3_moe", folder / "my-folder", shard="20KB", dtype=torch.bfloat16)
    assert len([*(folder / "my-folder").glob("*.safetensors")]) > 2
    return "my-folder"


def gguf(folder, monkeypatch):
    pytest.importorskip("gguf")
    save_tiny("qwen3_moe", folder / "plain", moe_intermediate_size=64, **WIDE)
    (folder / "ggufs").mkdir()
    write_gguf(folder / "plain", folder / "ggufs/model.gguf", "Q8_0")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "plain" / name, folder / "ggufs" / name)
    return "ggufs/model.gguf"


def mxfp4(folder, monkeypatch):
    save_tiny("gpt_oss", folder / "plain", dtype=torch.bfloat16, **WIDE)
    quantize(folder / "plain", folder / "my-gpt-oss", "mxfp4", folder / "twin")
    return "my-gpt-oss"


def pruned(folder, monkeypatch):
    save_tiny("olmoe", folder / "plain", num_experts=8, dtype=torch.bfloat16)
    words = (
        "prune",
        "plain",
        "-o",
        "my-pruned",
        "--criterion",
        "soft-count",
        "--keep",
        "0.5",
        "--tokens",
        "512",
        "--length",
        "64",
    )
    assert cli.main([*words]) == 0
    return "my-pruned"


@pytest.mark.slow
@pytest.mark.parametrize("make", [hub_name, sharded, gguf, mxfp4, pruned])
def test_eight_tasks_of_eight(make, tmp_path, monkeypatch, capsys, text_file):
    monkeypatch.chdir(tmp_path)
    model = make(tmp_path, monkeypatch)
    (tmp_path / "my-text.jsonl").write_text(
        json.dumps({"text": text_file.read_text()}) + "\n" + json.dumps({"text": "x = 1\n" * 400})
    )
    done = []
    for task, lines in commands().items():
        assert lines, task
        for words in lines:
            if words[0] == "serve":
                serve(tmp_path / words[1])
                continue
            given = [model if word == "my-model" else word for word in words]
            if "my-text.jsonl" in given:
                continue  # either of the two lines is enough; the first one ran
            code = cli.main([*given, *FEWER.get(words[0], ())])
            out, err = capsys.readouterr()
            assert code == 0, (task, given, err)
            assert out.strip(), (task, given)
        done.append(task)
    assert tuple(done) == TASKS
    assert (tmp_path / "elastic/report.html").is_file() and (tmp_path / "compared.html").is_file()


def serve(folder):
    """What the page's curl asks."""
    body = next(
        word
        for block in code_blocks(PAGE)
        for line in block.lines
        if line.startswith("curl")
        for word in shlex.split(line)
        if word[:1] == "{"
    )

    async def ask(url):
        async with httpx2.AsyncClient(timeout=120, follow_redirects=True) as web:
            assert "<html" in (await web.get(url.removesuffix("/v1"))).text
            return (await web.post(f"{url}/completions", json=json.loads(body))).json()

    with open_house(folder, probe_seconds=2.0) as house:
        assert asyncio.run(ask(house.url))["moe_prism"]["quality"] >= 0.9


def test_the_page_has_a_command_for_every_task():
    assert all(commands().values())
