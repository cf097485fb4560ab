"""What every option of a pool did on questions with known answers: measured once, kept in a file, and what choosers are fitted on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import httpx2
import numpy as np
from annotated_types import MaxLen, MinLen
from pydantic import Field, ValidationError, model_validator

from ...errors import PrismError, UsageError
from ...files import read_bounded, replace_file
from ...pool import Record
from ...schema.common import Form, Name, Share
from ...schema.read import RESTORE, JsonBounds, check, read_json
from .config import PoolFile
from .options import PoolOptions, energies
from .request import RouteRequest
from .upstream import NoAnswer, Refused, Upstream

MOST_BYTES, MOST_QUESTIONS, MOST_OPTIONS = 64 << 20, 1 << 16, 4096
NEXT = 'give lines like {"prompt": "The capital of France is", "answer": "Paris"}'
Text = Annotated[str, Field(max_length=1 << 20)]
Skills = Annotated[list[Name], MaxLen(64)]


class QuestionForm(Form):
    """A line of the file of questions. An answer is right where it begins with `answer`, but for white space around both."""

    prompt: Text
    answer: Annotated[str, Field(min_length=1, max_length=1 << 16)]
    skills: Skills = Field(default_factory=list)


class AnsweredForm(Form):
    """A question, and what each option did. quality: 1 for a right answer; seconds: to its end."""

    text: Text
    quality: Annotated[list[Share], MaxLen(MOST_OPTIONS)]
    seconds: Annotated[list[Annotated[float, Field(ge=0, le=1e6)]], MaxLen(MOST_OPTIONS)]
    skills: Skills = Field(default_factory=list)


class PoolRecordForm(Form):
    """record.json. options: MODEL@LEVEL."""

    version: Literal[1] = 1
    options: Annotated[list[Name], MinLen(1), MaxLen(MOST_OPTIONS)]
    questions: Annotated[list[AnsweredForm], MinLen(1), MaxLen(MOST_QUESTIONS)]

    @model_validator(mode="after")
    def _fits(self) -> PoolRecordForm:
        if len(set(self.options)) != len(self.options):
            raise ValueError("names an option twice")
        if any(len(q.quality) != len(self.options) or len(q.seconds) != len(self.options) for q in self.questions):
            raise ValueError("has a question without a value for each option")
        return self

    def record(self, upstreams: Sequence[Upstream]) -> Record:
        """As choosers take it."""
        skills = [q.skills for q in self.questions] if any(q.skills for q in self.questions) else ()
        texts = [q.text for q in self.questions]
        quality, seconds = (np.array(rows, float) for rows in zip(*((q.quality, q.seconds) for q in self.questions), strict=True))
        return Record(texts, quality, seconds, energies(self.options, upstreams), None, skills)


def read_record(path: Path) -> PoolRecordForm:
    """UsageError where it cannot be read, CorruptError for one that is not of the form."""
    return check(PoolRecordForm, read_json(path, RESTORE, JsonBounds(bytes=MOST_BYTES, depth=8)), str(path), RESTORE)


def read_questions(path: Path) -> list[QuestionForm]:
    """UsageError names the line of what is wrong."""
    try:
        lines = read_bounded(path, MOST_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}", NEXT) from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(QuestionForm.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                place = ".".join(map(str, first["loc"]))
                raise UsageError(f"{path}:{number}: {place + ': ' if place else ''}{first['msg'].lower()[:160]}", NEXT) from error
    if not 0 < len(found) <= MOST_QUESTIONS:
        raise UsageError(f"{path} has {len(found)} questions", f"give 1 to {MOST_QUESTIONS}")
    return found


def measure_pool(
    pool: PoolFile, questions: Sequence[QuestionForm], tokens: int, say: Callable[[str], None] | None = None
) -> PoolRecordForm:
    """Ask every option of every upstream every question, one at a time and one upstream after the other, at temperature 0.

    PrismError names the upstream that does not answer.
    """
    return asyncio.run(_measure(pool, questions, tokens, say or (lambda line: None)))


async def _measure(pool: PoolFile, questions: Sequence[QuestionForm], tokens: int, say: Callable[[str], None]) -> PoolRecordForm:
    upstreams = [Upstream(form, pool.form.bounds) for form in pool.form.upstreams]
    try:
        for upstream in upstreams:
            await upstream.look()
            if not upstream.up:
                raise PrismError(f"upstream '{upstream.form.name}' does not answer at {upstream.form.url}", "start it first")
        options = PoolOptions(PoolFile(pool.form, _any(), None, None), upstreams, None, ())
        answered = [AnsweredForm(text=q.prompt, quality=[], seconds=[], skills=q.skills) for q in questions]
        for option, each in enumerate(options.every):
            right = 0
            for question, row in zip(questions, answered, strict=True):
                began = time.monotonic()
                text = await _answer(options, option, question, tokens)
                row.seconds.append(round(time.monotonic() - began, 6))
                row.quality.append(float(text.strip().startswith(question.answer.strip())))
                right += int(row.quality[-1])
            say(f"{each.name}: {right} of {len(questions)} right")
        return PoolRecordForm(options=[each.name for each in options.every], questions=answered)
    finally:
        for upstream in upstreams:
            await upstream.close()


def _any() -> type:
    from ...pool.cheapest import Cheapest

    return Cheapest


async def _answer(options: PoolOptions, option: int, question: QuestionForm, tokens: int) -> str:
    choice = options.choice(option)
    upstream, each = choice.upstream, choice.option
    asked = RouteRequest.of({"prompt": question.prompt, "max_tokens": tokens, "temperature": 0})
    body, _ = asked.body(choice)
    until = asyncio.get_running_loop().time() + options.pool.form.bounds.request_seconds
    try:
        said = json.loads(await upstream.whole(await upstream.open("/completions", body, {}, until), until))
        return str(said["choices"][0]["text"])
    except (NoAnswer, Refused, httpx2.HTTPError) as error:
        why = error.reason if isinstance(error, NoAnswer) else f"{type(error).__name__} {getattr(error, 'status', '')}".strip()
        raise PrismError(f"'{each.name}' did not answer: {why}", "look at its log") from error
    except (LookupError, TypeError) as error:
        raise PrismError(f"'{each.name}' gave no completion", "a pool is measured on /v1/completions") from error


def write_record(path: Path, record: PoolRecordForm) -> None:
    """Complete or not at all."""
    replace_file(path, (record.model_dump_json(indent=1) + "\n").encode())
