"""Runs the README's commands in forks of one process that has paid for the imports: a start would cost more than most of them.

`python -m tests.docs.warm SOCKET` serves; CLIENT is a program that hands its arguments, folder and standard streams to it and ends
with the command's exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

# smaller numbers for the commands that have them, where the command line does not give its own
SMALL = {
    "refactor": {"--tokens": "1024", "--length": "256", "--profile-tokens": "1024"},
    "calibrate": {"--tokens": "1024", "--length": "256"},
    "frontier": {"--tokens": "256", "--length": "128", "--calibration-tokens": "256"},
    "generate": {"--max-tokens": "4"},
    "skip": {"--tokens": "256", "--length": "128"},
    "compress": {"--tokens": "1024", "--length": "256"},
    "prune": {"--tokens": "1024", "--length": "256", "--profile-tokens": "256"},
    "forecast": {"--tokens": "1024", "--seconds": "2"},
    "trace": {"--tokens": "1024"},
    "recover": {"--tokens": "2048", "--length": "64", "--steps": "2"},
}

CLIENT = """#!{python} -IS
import json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
socket.send_fds(link, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
sys.exit(int(link.recv(16) or 70))
"""


def smaller(arguments: Sequence[str]) -> list[str]:
    given = list(arguments)
    if {"--reslice", "--recipe"} & set(given):  # which take no other option
        return given
    if given[:1] == ["compress"] and not {"--keep", "--error-feedback"} & set(given):  # a codec alone looks at no text
        return given
    for name, value in SMALL.get(given[0] if given else "", {}).items():
        if name not in given and "--help" not in given:
            given += [name, value]
    return given


def perform(folder: str, arguments: list[str]) -> int:
    """One command, or Python code after `-c`."""
    from moe_prism import cli

    os.chdir(folder)
    if arguments[:1] != ["-c"]:
        return cli.main(smaller(arguments))
    exec(compile(arguments[1], "<README.md>", "exec"), {"__name__": "__main__"})
    return 0


def child(link: socket.socket) -> None:
    code = 1
    try:
        message, files, _, _ = socket.recv_fds(link, 1 << 20, 3)
        for target, file in enumerate(files):
            os.dup2(file, target)
        code = perform(*json.loads(message))
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        link.sendall(str(code).encode())
        os._exit(code)


def serve(address: str) -> None:
    import torch

    from moe_prism import elastic, report  # noqa: F401 - what every command needs, imported once
    from moe_prism.jobs import forecast_speed, frontier, prune, recover, refactor, skip, trace  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for: they report themselves
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        link, _ = server.accept()
        if os.fork() == 0:
            child(link)
        link.close()


if __name__ == "__main__":
    serve(sys.argv[1])
