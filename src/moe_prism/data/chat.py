"""Conversations through a model's chat template, which is code from the model's folder: it runs in a process that can be ended."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .fields import LeftOutError, Turns

SECONDS = 10  # of computing for one conversation
WALL_SECONDS = 120.0  # for the same, and for the process to start: a machine may have other work
TEMPLATE_BYTES = 1 << 20
LATE = {-getattr(signal, name) for name in ("SIGXCPU", "SIGKILL") if hasattr(signal, name)}  # who computes too long ends so
REFUSED = "rows that the chat template refuses"


class Chat:
    """Writes turns as a model reads them. Without a tokenizer, or one with a template, the contents stand one after the other."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._template = _template_of(tokenizer)
        self._special = dict(getattr(tokenizer, "special_tokens_map", None) or {}) if self._template else {}
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()
        self.refusal = ""  # what the template said last

    @property
    def has_template(self) -> bool:
        """Whether turns are more than their contents."""
        return self._template is not None

    def write(self, turns: Turns, *, for_answer: bool = False) -> str:
        """The conversation as text; for_answer: up to where the model's answer begins.

        Raises LeftOutError where the template refuses these turns, UsageError where it does not come to an end.
        """
        if self._template is None:
            return turns.plain
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"turns": turns.turns, "for_answer": for_answer}, default=str) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            self.close()
            raise _stuck("ended its process") from error
        answer = self._answer()
        if "text" not in answer:
            self.refusal = str(answer.get("error", ""))[:200]
            raise LeftOutError(REFUSED)
        return str(answer["text"])

    def _start(self) -> None:
        # by its path: as a module it would import this package, and torch with it
        command = [sys.executable, "-P", str(Path(__file__).with_name("render_chat.py"))]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        assert self._process.stdin is not None
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        first = {"template": self._template, "special": self._special, "seconds": SECONDS}
        self._process.stdin.write(json.dumps(first, default=str) + "\n")
        self._process.stdin.flush()
        if "ready" not in self._answer():
            self.close()
            raise _stuck("cannot be started")

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        try:
            line = self._lines.get(timeout=WALL_SECONDS)
        except queue.Empty as error:
            self.close()
            raise _stuck(f"did not end within {WALL_SECONDS:.0f} s") from error
        if not line:
            is_late = self._process.wait() in LATE
            self.close()
            raise _stuck(f"did not end within {SECONDS} s of computing" if is_late else "ended its process")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what it did not read
                        pipe.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _template_of(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:  # several, and none of them is the default
        raise UsageError(str(error).splitlines()[0], "leave one of the model's chat templates, or name --text-field") from error
    if len(template.encode()) > TEMPLATE_BYTES:
        raise UsageError(
            f"the model's chat template is larger than {TEMPLATE_BYTES >> 20} MiB", "write the text out, as .jsonl of 'text'"
        )
    return template


def _stuck(what: str) -> UsageError:
    return UsageError(f"the model's chat template {what}", "write the conversations out yourself, as .jsonl of 'text'")
