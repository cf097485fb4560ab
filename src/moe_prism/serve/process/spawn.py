"""The engine's process, from the outside: start it, hear whether it came up, end it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ...errors import PrismError
from .messages import Facts, Failed, Link, Start

STOP = b"stop"
"""Said on the process's standard input to end it in order. Its end without that word means that we are gone."""
PATIENCE = 15.0  # seconds the process may take to end: a step that has begun cannot be interrupted


class EngineProcess:
    """A Python of its own that runs `engine_main`. POSIX only."""

    def __init__(self, start: Start) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "moe_prism.serve.process.engine_main", str(theirs.fileno())]
        # what can be imported here can be imported there
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        with theirs, _signals_are_ours():
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment)  # noqa: S603
        self.link = Link(ours)
        with contextlib.suppress(OSError):  # it has died already, which `ready` will tell
            self.link.send(start)

    def ready(self) -> Facts:
        """Wait until the engine runs. Raises what kept it from that."""
        try:
            answer = self.link.receive()
        except (EOFError, OSError):
            raise PrismError(f"the engine's process {self.outcome()} while it started", "see whether memory ran out") from None
        if isinstance(answer, Failed):
            raise answer.error()
        return answer  # type: ignore[no-any-return]

    @property
    def pid(self) -> int:
        return self._child.pid

    def outcome(self) -> str:
        """How it ended, once its socket is closed."""
        try:
            code = self._child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        return f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"

    def stop(self) -> None:
        """End it in order, or else by force. Returns when it is gone."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self._child.communicate(STOP, timeout=PATIENCE)
        self.kill()

    def kill(self) -> None:
        """End it now."""
        self._child.kill()
        self._child.wait()
        if self._child.stdin is not None:
            with contextlib.suppress(OSError):
                self._child.stdin.close()
        self.link.socket.close()


@contextlib.contextmanager
def _signals_are_ours() -> Iterator[None]:
    """A process started inside the block never sees what a terminal or a supervisor sends to all: we say when it ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
