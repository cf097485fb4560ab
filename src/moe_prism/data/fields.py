"""What a row says: the fields that people's data sets have, as plain text or as the turns of a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

Turn = Mapping[str, Any]
"""role and content, and whatever else a chat template knows."""

KNOWN = ("text", "messages", "conversations", "conversation", "prompt", "instruction")  # the first that a row has is taken
ANSWERS = ("completion", "response", "output", "answer")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"}
SHOWN = 12  # field names in a message
NO_FIELD, NO_OBJECT, NO_TEXT = "rows without a field of text", "rows that are no objects", "rows whose field is no text"
STRANGE = {NO_FIELD, NO_OBJECT, NO_TEXT}
"""Of rows that were not meant to be text: a file of nothing else is refused."""


class LeftOutError(Exception):
    """A row that is not read; its text is the reason, as it is counted."""


@dataclass(frozen=True)
class Turns:
    """A conversation. joint: what stands between the turns where no chat template says it."""

    turns: tuple[Turn, ...]
    joint: str = "\n\n"

    @property
    def plain(self) -> str:
        """The contents alone."""
        return self.joint.join(turn.get("content") or "" for turn in self.turns)

    def question(self) -> Turns:
        """Without the answers at its end."""
        end = len(self.turns)
        while end and self.turns[end - 1].get("role") == "assistant":
            end -= 1
        return Turns(self.turns[:end], self.joint)


def is_known(columns: Iterable[str], names: Sequence[str]) -> bool:
    """Whether a row with these columns can be read; names: the fields that were named, if any."""
    given = set(columns)
    return bool(given.issuperset(names) if names else given.intersection(KNOWN))


def wanted_columns(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Of a table's columns, those that `content_of` may look at."""
    useful = set(names) if names else {*KNOWN, *ANSWERS, "input"}
    return [c for c in columns if c in useful]


def unknown_fields(where: str, columns: Iterable[str], names: Sequence[str]) -> UsageError:
    """The refusal of rows that have none of the fields."""
    have = [str(c)[:40] for c in columns]
    shown = ", ".join(f"'{c}'" for c in have[:SHOWN]) + (f" and {len(have) - SHOWN} more" if len(have) > SHOWN else "")
    lacks = f"not {' and '.join(repr(n) for n in names)}" if names else "none that is known as text"
    return UsageError(f"{where} has the fields {shown or 'of no name'}, {lacks}", "name those with text: --text-field NAME,NAME")


def content_of(row: Any, names: Sequence[str]) -> str | Turns:
    """The text or the conversation of a row. Raises LeftOutError."""
    if not isinstance(row, Mapping):
        raise LeftOutError(NO_OBJECT)
    if names:
        return _named(row, names)
    present = [name for name in KNOWN if name in row]
    if not present:
        raise LeftOutError(NO_FIELD)
    name = next((n for n in present if row[n] is not None), None)
    if name is None:
        raise LeftOutError("null rows")
    if name in ("prompt", "instruction"):
        return _question_and_answer(row, name)
    return _value(row[name])


def _named(row: Mapping[str, Any], names: Sequence[str]) -> str | Turns:
    if any(name not in row for name in names):
        raise LeftOutError(NO_FIELD)
    values = [_value(row[name]) for name in names if row[name] is not None]
    if not values:
        raise LeftOutError("null rows")
    if len(values) == 1:
        return values[0]
    return "\n\n".join(v if isinstance(v, str) else v.plain for v in values)


def _question_and_answer(row: Mapping[str, Any], name: str) -> Turns:
    """prompt + completion, or instruction + input + output: strings, or lists of turns."""
    answer = next((a for a in ANSWERS if a in row), None)
    if answer and row[answer] is None:
        raise LeftOutError("null rows")
    more = row.get("input") if name == "instruction" else None
    question = f"{row[name]}\n\n{more}" if isinstance(more, str) and more.strip() else row[name]
    turns = _as_turns(question, "user") + (_as_turns(row[answer], "assistant") if answer else ())
    if not any((turn["content"] or "").strip() for turn in turns):
        raise LeftOutError("empty rows")
    return Turns(turns, "" if name == "prompt" else "\n\n")


def _as_turns(value: Any, role: str) -> tuple[Turn, ...]:
    found = _value(value)
    return found.turns if isinstance(found, Turns) else ({"role": role, "content": found},)


def _value(value: Any) -> str | Turns:
    """A string, or a list of messages."""
    if isinstance(value, str):
        if not value.strip():
            raise LeftOutError("empty rows")
        # an escaped half of a surrogate pair is legal JSON and no text: nothing downstream could encode it
        return value.encode("utf-8", "replace").decode("utf-8")
    if not isinstance(value, list | tuple):
        raise LeftOutError(NO_TEXT)
    if not value:
        raise LeftOutError("empty rows")
    if all(isinstance(part, str) for part in value):
        return _value("\n\n".join(value))
    turns = tuple(_turn(each) for each in value)
    if not any((turn["content"] or "").strip() for turn in turns):
        raise LeftOutError("empty rows")
    return Turns(turns)


def _turn(message: Any) -> Turn:
    """role/content, or ShareGPT's from/value, as role/content."""
    role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not {"content", "value"} & set(message):
        raise LeftOutError(NO_TEXT)
    content = message["content"] if "content" in message else message["value"]
    rest = {
        k: v for k, v in message.items() if k in ("tool_calls", "tool_call_id", "name", "reasoning_content") and v is not None
    }
    return {"role": ROLES.get(role.lower(), role.lower()), "content": _content(content), **rest}


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content.encode("utf-8", "replace").decode("utf-8")
    if not isinstance(content, list) or not all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        raise LeftOutError("rows with pictures or other parts that are no text")
    return _content("".join(p["text"] for p in content))
