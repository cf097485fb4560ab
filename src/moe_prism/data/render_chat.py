"""The process that runs a chat template: lines of JSON in, lines of JSON out; see `data.chat`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

try:
    import resource
except ImportError:  # no such limits on this system
    resource = None  # type: ignore[assignment]

MEMORY = 4 << 30  # bytes of address space: a template can also ask for a string of any length


def main() -> None:
    """Reads the template, then conversations; answers each with its text, or with what the template says against it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints must not answer
    first = json.loads(sys.stdin.readline())
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _say(out, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        _limit_computing(first["seconds"])
        try:
            rendered, _ = render_jinja_template(
                [asked["turns"]],
                chat_template=first["template"],
                add_generation_prompt=asked["for_answer"],
                **first["special"],
            )
        except Exception as error:  # noqa: BLE001 - of whatever kind a template raises
            _say(out, {"error": f"{type(error).__name__}: {error}"})
        else:
            _say(out, {"text": rendered[0]})


def _say(out: object, answer: dict[str, object]) -> None:
    print(json.dumps(answer), file=out, flush=True)  # type: ignore[call-overload]


def _limit_memory() -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _limit_computing(seconds: int) -> None:
    """From now on; the system ends a process that goes on longer, also when nobody waits for it any more."""
    if resource is not None:
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, most))


if __name__ == "__main__":
    main()
