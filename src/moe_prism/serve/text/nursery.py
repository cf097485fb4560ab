"""The process that forks the processes that work on clients' texts, and what those do."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import struct
import threading
from pathlib import Path

import msgspec

from .desk import Desk
from .jobs import Compile, Job

_SIZE = struct.Struct("!Q")
_job = msgspec.msgpack.Decoder(Job)
_encode = msgspec.msgpack.Encoder().encode
_NICE = 5
"""Below the engine and the HTTP loop, where there is not enough for all."""
_SOON = 0.1
"""Seconds of a processor after which a job gets only what nobody else wants. Its process ends with it: one cannot take that back."""


class Nursery:
    """Forks at once. POSIX only."""

    def __init__(self, desk: Desk, seconds: float, memory: int) -> None:
        """seconds: of a processor, for one job; memory: bytes that a process may come to need beside what it begins with."""
        self._ours, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._gone = False
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _forker(theirs, desk, seconds, memory)
            finally:
                os._exit(1)
        theirs.close()

    def worker(self) -> tuple[socket.socket, int]:
        """A new process: our end of a socket to it, which does not block, and its id. OSError if there is no nursery any more."""
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._ours, [b"f"], [theirs.fileno()])
                answer = self._ours.recv(_SIZE.size)
        except OSError:
            ours.close()
            raise
        if len(answer) < _SIZE.size:
            ours.close()
            raise OSError("no process can be forked")
        ours.setblocking(False)
        return ours, _SIZE.unpack(answer)[0]

    def ended(self) -> bool:
        """Whether it has, though nobody asked it to: somebody killed it, or the system did for its memory."""
        if not self._gone:
            with contextlib.suppress(ChildProcessError):
                self._gone = os.waitpid(self._pid, os.WNOHANG)[0] != 0
        return self._gone

    def close(self) -> None:
        """End it; its children end with their sockets, or after their time."""
        self._ours.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _forker(link: socket.socket, desk: Desk, seconds: float, memory: int) -> None:
    """Fork on request until the other side is gone. Does not return."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    kept = link.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    gc.disable()  # what is shared stays shared
    while True:
        message, handles, _, _ = socket.recv_fds(link, 1, 1)
        if not message:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            try:
                link.close()
                _work(socket.socket(fileno=handles[0]), desk, seconds, memory)
            finally:
                os._exit(0)
        os.close(handles[0])
        link.sendall(_SIZE.pack(pid))


def _work(link: socket.socket, desk: Desk, seconds: float, memory: int) -> None:
    """Do jobs until the other side is gone. The kernel ends a process whose job takes more than its time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    os.nice(_NICE)
    with contextlib.suppress(OSError, ValueError):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    costly = False

    def yield_to_others(*_: object) -> None:
        nonlocal costly
        costly = True
        os.setpriority(os.PRIO_PROCESS, 0, 19)  # whatever the server's own is

    signal.signal(signal.SIGVTALRM, yield_to_others)
    while not costly and (head := _exactly(link, _SIZE.size)):
        job = _job.decode(_exactly(link, _SIZE.unpack(head)[0]))
        if not isinstance(job, Compile):  # the first of those learns the vocabulary, for all that follow
            signal.setitimer(signal.ITIMER_VIRTUAL, _SOON)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = desk.do(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        body = _encode(result)
        link.sendall(_SIZE.pack(len(body)) + body)


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = link.recv(min(size - len(data), 1 << 20))
        if not more:
            return b""
        data += more
    return bytes(data)
