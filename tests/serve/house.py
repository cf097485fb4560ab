"""A real server in this process, for tests: tiny model, tiny limits, a free port."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_prism.options.serve import ServeOptions
from moe_prism.serve.build import Built, build
from moe_prism.serve.config import read_config
from moe_prism.serve.http.app import Administration, create_app
from moe_prism.serve.server import listen, make_server

LEVELS = [
    {"name": "low", "budget": 0.25, "slots": 2.0, "quality": 0.8},
    {"name": "half", "budget": 0.5, "slots": 4.0, "quality": 0.9},
]
TEMPLATE = (
    "{% for t in tools or [] %}tool {{ t.function.name + '\n' }}{% endfor %}"
    "{% if enable_thinking %}{{ 'think\n' }}{% endif %}{% if reasoning_effort %}effort {{ reasoning_effort + '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %} call {{ c.function.name }} {{ c.function.arguments.x }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SMALL: dict[str, Any] = {"engine": {"process": False, "requests": 4, "step_tokens": 64, "cache_tokens": 2048, "page": 16}}


@dataclass
class House:
    """url ends with /v1."""

    url: str
    port: int
    built: Built
    folder: Path

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def idle(self, seconds: float = 10.0) -> list[str]:
        """What is still held once nothing runs, or what remains after the time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            held = self._in_engine() + [f"{self.built.door.requests} places"] * bool(self.built.door.requests)
            if not held:
                return []
            time.sleep(0.01)
        return held

    def _in_engine(self) -> list[str]:
        engine = self.built.service.engine
        if hasattr(engine, "check_integrity"):
            return engine.check_integrity()
        news = engine.last_turn
        until = time.monotonic() + 5
        while engine.last_turn == news and time.monotonic() < until:
            time.sleep(0.01)  # what it last said may be older than what it was last told
        now = engine.gauges()
        return [f"{count} requests" for count in (len(engine.book), now.running, now.waiting) if count]


def with_levels(source: Path, target: Path) -> Path:
    """A copy of an elastic folder that has operating points."""
    shutil.copytree(source, target)
    (target / "ladder.json").write_text(json.dumps({"levels": LEVELS}))
    return target


@contextmanager
def open_house(folder: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Iterator[House]:
    """Serve a folder until the block ends."""
    settings = read_config({**SMALL, **(config or {})})
    options = {"port": 0, "policy": "fifo", "probe_seconds": 0.05, "name": "tiny", **options}
    built = build(folder, ServeOptions(**options), settings)
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    key = options.get("api_key")
    shelf = options.get("adapter_folder")
    admin = None if shelf is None else Administration(options["admin_key_file"].read_text().split(), shelf)
    app = create_app(built.house, built.history, key.split() if key else (), options.get("allowed_origins", ()), admin)
    server = make_server(app, built, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield House(f"http://127.0.0.1:{port}/v1", port, built, folder)
    finally:
        server.should_exit = True
        thread.join(10)
        built.stop()
        listening.close()
    assert not thread.is_alive() and not built.service.engine.alive
