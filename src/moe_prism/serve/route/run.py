"""Start a router, and run it until a signal ends it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...options.route import RouteOptions
from ..keys import keep_private
from ..server import check_host, listen

if TYPE_CHECKING:
    from .app import PoolRouter
    from .config import PoolFile

logger = logging.getLogger(__name__)


def route_pool(pool: str | Path, options: RouteOptions | None = None) -> None:
    """Route requests among the models of a pool until a signal ends it. From the main thread, which hears signals.

    Raises UsageError for a file, a record or an address that is wrong.

    >>> import os, signal, threading, moe_prism
    >>> threading.Timer(5, os.kill, (os.getpid(), signal.SIGTERM)).start()  # who stops it here; else Ctrl+C
    >>> with open("pool.yaml", "w") as file:
    ...     _ = file.write("upstreams: [{name: small, url: 'http://127.0.0.1:8001'}]")
    >>> moe_prism.route_pool("pool.yaml", moe_prism.RouteOptions(port=0))
    """
    options = options or RouteOptions()
    options.check()
    keep_private()
    allowed = check_host(options)
    need_packages()
    from .config import read_pool

    read = read_pool(Path(pool))
    listening = listen(options.host, options.port)
    try:
        run_router(read, listening, allowed, options.allowed_origins)
    finally:
        listening.close()


def need_packages() -> None:
    """UsageError where the libraries of `moe-prism[serve]` are missing."""
    try:
        import fastapi
        import httpx2
        import prometheus_client
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"routing needs {error.name}", "pip install 'moe-prism[serve]'") from error
    del fastapi, httpx2, prometheus_client


def make_router(pool: PoolFile) -> PoolRouter:
    """Everything that a pool's file says. UsageError, CorruptError for a record that is none."""
    from .app import PoolRouter
    from .metrics import RouteMetrics
    from .options import PoolOptions
    from .record import read_record
    from .turnstile import Turnstile
    from .upstream import Upstream

    upstreams = [Upstream(form, pool.form.bounds) for form in pool.form.upstreams]
    form = None if pool.record is None else read_record(pool.record)
    if form is None and pool.chooser.needs_record:
        raise UsageError(
            f"chooser '{pool.form.chooser}' needs a record",
            "measure one with `moe-prism route POOL --measure QUESTIONS --out FILE`",
        )
    record = None if form is None else form.record(upstreams)
    options = PoolOptions(pool, upstreams, record, () if form is None else form.options)
    metrics = RouteMetrics(upstreams)
    return PoolRouter(options, upstreams, metrics, Turnstile(sum(u.form.requests for u in upstreams), metrics.refuse))


def measure_and_write(path: Path, options: RouteOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a pool and write its record. Facts for a report: questions, and the share of right answers of every option."""
    need_packages()
    from .config import read_pool
    from .record import measure_pool, read_questions, write_record

    assert options.measure is not None and options.out is not None
    if options.out.exists():
        raise UsageError(f"'{options.out}' exists", "give another --out, or remove it")
    pool = read_pool(path)
    form = measure_pool(pool, read_questions(options.measure), options.tokens, say)
    write_record(options.out, form)
    count = len(form.questions)
    quality = {name: sum(q.quality[o] for q in form.questions) / count for o, name in enumerate(form.options)}
    return {"record": str(options.out), "questions": count, "quality": quality}


def router_server(router: PoolRouter, allowed: Sequence[str] = (), origins: Sequence[str] = ()) -> Any:
    """A uvicorn server; `run(sockets=[...])` returns after the drain."""
    from ..http.draining import Behind, draining_server
    from .app import create_router

    app = create_router(router, allowed, origins)
    return draining_server(app, router.options.pool.form.bounds, router.door, Behind(lambda: False, lambda: None))


def run_router(pool: PoolFile, listening: socket.socket, allowed: Sequence[str], origins: Sequence[str]) -> None:
    """Serve on a bound socket."""
    router = make_router(pool)
    host, port = listening.getsockname()[:2]
    fields = {
        "url": f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1",
        "pool": pool.form.name,
        "chooser": pool.form.chooser,
        "upstreams": [form.name for form in pool.form.upstreams],
    }
    logger.info("ready", extra={"fields": fields})
    try:
        router_server(router, allowed, origins).run(sockets=[listening])
    finally:
        logger.info("stopped")
