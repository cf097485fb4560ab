"""Start, serve, drain, stop."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import PrismError, UsageError
from ..files import check_writable
from ..options.serve import ListenOptions, ServeOptions
from ..point.named import source_of
from .http.crowd import Doorway
from .keys import admin_keys, keep_private, keys
from .requests import Event
from .spans import need_spans, spans_of

if TYPE_CHECKING:
    from .build import Built
    from .config import Config
    from .http.guard import Guard

logger = logging.getLogger(__name__)

SEND_BUFFER = 128 << 10
"""Bytes the kernel may hold for a client that does not read; by default it would be megabytes."""
RECEIVE_BUFFER = 32 << 10
"""Bytes the kernel may hold of a client whose request we do not read yet, and so the most that comes in at once. The kernel doubles it."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
TURN = 3e-4
"""Seconds a thread may keep the interpreter while another wants it. An engine in a thread gives it up at every tensor operation, and with
Python's 5 ms would wait that long for the HTTP loop each time: of the tokens per second under load this was a sixth
(docs/developer/log.md)."""


def serve_model(folder: str | Path, options: ServeOptions | None = None) -> None:
    """Serve an elastic folder with an OpenAI-compatible API until a signal ends it. From the main thread, which hears signals.

    What can be wrong is looked at in the order of what it costs to find out. Raises UsageError, CorruptError, or PrismError where the
    engine dies.

    >>> import os, signal, threading, moe_prism
    >>> threading.Timer(40, os.kill, (os.getpid(), signal.SIGTERM)).start()  # who stops it here; else Ctrl+C
    >>> moe_prism.serve_model("elastic", moe_prism.ServeOptions(port=0))
    """
    folder, options = Path(folder), options or ServeOptions()
    options.check()
    keep_private()
    from .config import load_config

    config = load_config(options.config)
    if options.points and folder.is_dir():
        source_of(folder, options.points)
    check_folder(folder)
    allowed = check_host(options)
    administrators = admin_keys(options)
    if options.adapter_folder is not None and not options.adapter_folder.is_dir():
        raise UsageError(f"there is no folder '{options.adapter_folder}'", "give --adapter-folder one that holds adapters")
    if options.trace_out is not None:
        check_writable(options.trace_out)
        if options.trace_out.exists():
            raise UsageError(f"'{options.trace_out}' exists", "give --trace-out another name, or remove it")
    listening = listen(options.host, options.port)
    try:
        need_packages()
        need_spans(options.otlp_traces_endpoint)
        run(folder, options, config, listening, Allowed(allowed, administrators))
    finally:
        listening.close()


class Allowed(NamedTuple):
    """Keys of clients, and of administrators."""

    clients: Sequence[str] = ()
    administrators: Sequence[str] = ()


def check_host(options: ListenOptions) -> tuple[str, ...]:
    """The keys; UsageError for an address that others can reach, without one."""
    allowed = keys(options)
    if options.host not in LOOPBACK and not allowed:
        raise UsageError(
            f"--host {options.host} is reachable from outside and needs a key", "give --api-key-file, or leave --host out"
        )
    return allowed


def check_folder(folder: Path) -> None:
    """UsageError or CorruptError for a folder that cannot be served, before anything is loaded."""
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder '{folder}'", "give one with a config.json, best one written by `moe-prism refactor`"
        )
    from ..checkpoint import read_manifest
    from ..checkpoint.manifest import MANIFEST, WEIGHTS_FILE
    from ..checkpoint.whole import look
    from ..model import resolve

    if not (folder / MANIFEST).is_file():
        look(resolve(folder))
    elif WEIGHTS_FILE not in read_manifest(folder):
        look(folder)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow is done."""
    if not 0 <= port <= 65_535:
        raise UsageError(f"--port {port} is no port", "give one from 1 to 65535, or 0 for any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = Doorway(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    try:
        made.bind((host, port))
        made.listen(1024)
    except OSError as error:
        made.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}", "choose another --port or --host") from error
    return made


def need_packages() -> None:
    """UsageError where the libraries of `moe-prism[serve]` are missing."""
    try:
        import fastapi
        import prometheus_client
        import psutil  # transformers' cache asks for it
        import transformers.generation.continuous_batching.cache_allocators  # not there before 5.18
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"serving needs {error.name}", "pip install 'moe-prism[serve]'") from error
    del fastapi, prometheus_client, psutil, transformers


def run(folder: Path, options: ServeOptions, config: Config, listening: socket.socket, allowed: Allowed | None = None) -> None:
    """Load, measure, and serve on a bound socket."""
    allowed = allowed or Allowed()
    from ..jobs.which_text import texts_of
    from .build import build
    from .http.app import Administration, create_app

    began = time.monotonic()
    _allow_files(config.bounds.connections)
    host, port = listening.getsockname()[:2]
    here = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    judged = texts_of(folder)
    logger.info("starting", extra={"fields": {"folder": folder.name, "status": f"{here}/status", **judged}})
    built = build(folder, options, config)
    engine = built.service.engine
    built.service.spans = spans_of(options.otlp_traces_endpoint, engine.clock)  # it has a thread: after all that forks
    admin = None if options.adapter_folder is None else Administration(allowed.administrators, options.adapter_folder)
    app = create_app(built.house, built.history, allowed.clients, options.allowed_origins, admin)
    fields = {
        "url": f"{here}/v1",
        "status": f"{here}/status",
        "model": built.service.name,
        "engine": engine.pid,
        "policy": engine.policy_name,
        "levels": len(built.service.ladder),
        "ladder": built.facts.ladder_from,
        "cost": built.facts.cost_from,
        "seconds": round(time.monotonic() - began, 2),
    }
    if not config.engine.process:
        sys.setswitchinterval(TURN)
    gc.collect()
    gc.freeze()  # the model's objects live as long as the process: no pause to look at them again, here or on the way out
    logger.info("ready", extra={"fields": fields})
    try:
        make_server(app, built, config).run(sockets=[listening])
    finally:
        ended = built.ended()
        built.stop()
        if built.service.spans is not None:
            built.service.spans.close()
        logger.info("stopped")
    if ended:
        raise PrismError(ended, "start the server again; the log says more")


def _allow_files(connections: int) -> None:
    """As many open files as connections and ourselves may need, where the system lets us."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + 512
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def make_server(app: Guard, built: Built, config: Config) -> Any:
    """A uvicorn server with our deadlines; `run(sockets=[...])` returns after the drain, or when what it needs has ended by itself."""
    from .http.draining import Behind, draining_server
    from .process.supervisor import Watch

    engine, watch = built.service.engine, Watch()

    def look() -> bool:
        """A server without what it needs ends too; an engine that hangs is given up."""
        if built.ended():
            return True
        if engine.alive and watch.still(engine.last_turn, engine.clock()) > config.bounds.step_seconds:
            engine.give_up(config.bounds.step_seconds)
        return False

    def cut_off() -> None:
        for request in list(engine.book.values()):
            engine.cancel(request.job.id)
            request.sink(Event(error="the server is shutting down"))

    return draining_server(app, config.bounds, built.door, Behind(look, cut_off))
