"""Every parser of what comes from outside, as a function of bytes. It returns, or raises a PrismError in one line: the rest are defects."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from moe_prism.checkpoint import Journal, Source
from moe_prism.checkpoint.manifest import parse_manifest
from moe_prism.errors import PrismError
from moe_prism.forecast.step_cost import CostModel
from moe_prism.model.named import NANO
from moe_prism.offload.trace import SHIPPED, load_trace
from moe_prism.point import read_points
from moe_prism.serve.config import load_config
from moe_prism.serve.http.protocol import REQUESTS
from moe_prism.serve.http.refusal import Refusal
from moe_prism.serve.route.config import read_pool
from moe_prism.serve.route.record import read_questions, read_record
from moe_prism.serve.route.request import RouteRequest
from moe_prism.serve.route.upstream import ModelList

SHARED = Path("/dev/shm")
FOLDER = Path(tempfile.mkdtemp(prefix="moe-prism-fuzz-", dir=SHARED if SHARED.is_dir() else None))
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors"}}
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
TENSORS = struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 8


def _file(name: str, use: Callable[[Path], object]) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        path = FOLDER / name
        path.write_bytes(data)
        return use(path)

    return run


def _index(data: bytes) -> object:
    folder = FOLDER / "sharded"
    folder.mkdir(exist_ok=True)
    (folder / "model-1.safetensors").write_bytes(TENSORS)
    (folder / "model.safetensors.index.json").write_bytes(data)
    return Source(folder)


def _header(data: bytes) -> object:
    folder = FOLDER / "single"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    return Source(folder)


def _journal(data: bytes) -> object:
    (FOLDER / "journal.json").write_bytes(data)
    return Journal(FOLDER, {"seed": 0}).units()


def _request(kind: str) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None  # the framework's answer
        return REQUESTS[kind].model_validate(value)  # type: ignore[index]

    return run


def _routed(data: bytes) -> object:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None  # refused before
    asked = RouteRequest.of(value)
    asked.text()
    return asked.wanted("pool", {"small": None})


TARGETS: dict[str, Callable[[bytes], object]] = {
    "header": _header,
    "index": _index,
    "manifest": _file("prism.json", parse_manifest),
    "journal": _journal,
    "trace": _file("trace.npz", load_trace),
    "points": _file("plan.json", read_points),
    "cost": _file("cost.json", CostModel.load),
    "config": _file("qos.yaml", load_config),
    "completions": _request("completions"),
    "chat": _request("chat"),
    "routed": _routed,
    "models": ModelList.model_validate_json,
    "pool": _file("pool.yaml", read_pool),
    "record": _file("record.json", read_record),
    "questions": _file("questions.jsonl", read_questions),
}

SEEDS: dict[str, list[bytes]] = {
    "header": [TENSORS],
    "index": [json.dumps(INDEX).encode()],
    "manifest": [b'{"kind": "pruned", "schema": 1, "files": {}, "sha256": ""}'],
    "journal": [b'{"fingerprint": {"seed": 0}, "units": {"a": "' + b"0" * 64 + b'"}}'],
    "trace": [SHIPPED.read_bytes()[:4096]],
    "points": [b'{"version": 1, "slots": {"budget": 0.5, "rule": "product"}}', b'{"plan": {"0": 2}}'],
    "cost": [b'{"version": 1}'],
    "config": [b"engine: {requests: 4}\nclasses:\n  a: {min_quality: 0.5, ttft_ms: 100}\n"],
    "completions": [b'{"prompt": "x", "stop": ["a"], "logit_bias": {"1": 2}, "stream_options": {"include_usage": true}}'],
    "chat": [
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "response_format": {"type": "text"}}'
    ],
    "routed": [
        b'{"model": "small@0.5", "messages": [{"content": [{"text": "x"}]}], "min_quality": 0.5, "ttft_ms": 3}',
        b'{"prompt": ["x"]}',
    ],
    "models": [b'{"data": [{"id": "s", "operating_points": [{"name": "low", "quality": 0.5, "slots": 2}]}]}'],
    "pool": [
        b"chooser: moe2\nsettings: {ridge: 1}\nupstreams:\n  - {name: a, url: 'http://h/v1', levels: [x], cost: 2}\nbounds: {tries: 2}\n"
    ],
    "record": [
        b'{"version": 1, "options": ["a@b"], "questions": [{"text": "x", "quality": [1.0], "seconds": [0.5], "skills": ["s"]}]}'
    ],
    "questions": [b'{"prompt": "x", "answer": "y", "skills": ["s"]}\n'],
}
assert NANO.is_dir() and SEEDS.keys() == TARGETS.keys()


def check(name: str, data: bytes) -> None:
    """Run a target; raises where it does something else than it may."""
    try:
        TARGETS[name](data)
    except PrismError as error:
        assert "\n" not in str(error), error
    except (ValidationError, Refusal):
        assert name in ("completions", "chat", "routed", "models")  # answered with 400; an upstream that is not up
