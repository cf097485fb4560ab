"""Prompts for a model to answer, from the same files as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..options.text import TextSource
from ..tally import TextTally, report_reading
from .chat import Chat
from .document import Document
from .fields import LeftOutError, Turns
from .text import Reading, stream_contents

NO_QUESTION = "rows without a question"


@dataclass(frozen=True)
class Task:
    """A prompt as the model reads it, up to where its answer begins; sha256: of what the row says, an answer of its own included."""

    name: str
    domain: str
    prompt: str
    sha256: str


def read_tasks(tokenizer: Any, source: TextSource) -> tuple[dict[str, list[Task]], list[dict[str, Any]]]:
    """(tasks of every domain in the order of their hashes, which is one by chance, each once; the tally of every file).

    Rows are asked up to the last turn that is not an answer; of a file of plain text, every line. Raises UsageError for a file without
    tasks.
    """
    found, read = {}, []
    for domain, path in source.parts:
        tally = TextTally(path)
        with Chat(tokenizer) as chat:
            reading = Reading(tally, source.fields, chat)
            every = {task.prompt: task for task in _tasks(path, domain, reading)}
        if not every:
            counted = tally.line().partition("; ")[2]
            raise UsageError(
                f"'{path}' holds no tasks{f': {counted}' if counted else ''}", "give rows with a prompt, or a line for each"
            )
        tally.documents = len(every)
        report_reading(tally)
        read.append(tally.to_json())
        found[domain] = sorted(every.values(), key=lambda task: task.sha256)
    return found, read


def _tasks(path: str, domain: str, reading: Reading) -> Iterator[Task]:
    for place, said, is_row in stream_contents(path, reading):
        lines = said.split("\n") if isinstance(said, str) and not is_row else [said]
        for number, each in enumerate(lines, 1):
            name = place if is_row else f"{place}:{number}"
            try:
                if isinstance(each, Turns) or each.strip():
                    yield _task(name, domain, each, reading.chat)
            except LeftOutError as reason:
                reading.tally.leave_out(str(reason), name)


def _task(name: str, domain: str, said: str | Turns, chat: Chat) -> Task:
    turns = said if isinstance(said, Turns) else Turns(({"role": "user", "content": said},))
    question = turns.question()
    if not any(turn.get("role") == "user" and (turn.get("content") or "").strip() for turn in question.turns):
        raise LeftOutError(NO_QUESTION)
    whole = said if isinstance(said, str) else chat.write(said)
    return Task(name, domain, chat.write(question, for_answer=True), Document(name, whole).sha256)
