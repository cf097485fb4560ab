"""How the text of a command is named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

SOURCES = (
    "stdlib, topics, domains (or one of domains/python, domains/prose, domains/headers, domains/web), "
    "a text file, rows (.jsonl, .json, .csv, .parquet, also .gz and .zst), a folder, a git checkout or a saved dataset"
)
FORMS = "a text file, a folder, rows (.jsonl, .json, .csv, .parquet), a saved dataset"
SHIPPED_TEXTS = ("stdlib", "topics", "domains", "domains/python", "domains/prose", "domains/headers", "domains/web")
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


DEFAULT_TEXT = "Default: what the folder was calibrated on, else domains; stdlib for nano."
FIELDS = "Comma-separated fields of rows that hold the text. Default: text, messages, conversations, prompt, instruction."
DOMAINS = "NAME=PATH instead of --text, once per domain: as many tokens of each"


@dataclass(frozen=True)
class TextSource:
    """Where text is read from. parts: (domain, path or bundled name), a single one without a name; fields: of rows, if named."""

    parts: tuple[tuple[str, str], ...]
    fields: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For people: the path, or name=path of every domain."""
        return ", ".join(f"{name}={path}" if name else path for name, path in self.parts)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains; none where the text has none."""
        return tuple(name for name, _ in self.parts if name)

    def facts(self) -> dict[str, Any]:
        """For a manifest: what `source_in` reads again."""
        plain = self.parts[0][0] == "" and not self.fields
        more = {} if plain else {"text_source": {"parts": [list(p) for p in self.parts], "fields": list(self.fields)}}
        return {"text": self.label, **more}

    @classmethod
    def of(cls, given: str | TextSource) -> TextSource:
        """A path or a bundled name as a source of one part."""
        return given if isinstance(given, TextSource) else cls((("", str(given)),))


def text_source(text: str | None, fields: Sequence[str] = (), domains: Sequence[str] = ()) -> TextSource:
    """The source that --text, --text-field and --domain name together. UsageError where they cannot be meant together."""
    if not domains:
        if text is None:
            raise UsageError("no text was named", "say which with --text")
        parts: tuple[tuple[str, str], ...] = (("", text),)
    elif text is not None:
        raise UsageError("--text and --domain exclude each other", "name that text as a domain, too")
    else:
        parts = named_parts(domains, "--domain")
    return TextSource(parts, tuple(fields))


def check_there(source: TextSource) -> None:
    """UsageError for a text that is neither shipped nor there."""
    for _, path in source.parts:
        if path not in SHIPPED_TEXTS and not Path(path).expanduser().exists():
            raise absent(path)


def absent(path: str | Path, what: str = "does not exist") -> UsageError:
    """What is said of a text that is neither shipped nor there."""
    return UsageError(f"text source '{path}' {what}", f"give {FORMS}, or one of {', '.join(SHIPPED_TEXTS)}")


def named_parts(given: Sequence[str], flag: str) -> tuple[tuple[str, str], ...]:
    """(name, path) of every NAME=PATH. UsageError for another form, or a name that is given twice."""
    parts = []
    for each in given:
        name, sign, path = each.partition("=")
        if not sign or not path or not DOMAIN_NAME.fullmatch(name):
            raise UsageError(
                f"{flag} '{each}' is not NAME=PATH", "write it like code=folder, the name of letters, digits, - and _"
            )
        parts.append((name, path))
    names = [name for name, _ in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"{flag} names '{twice}' twice", "give every domain another name")
    return tuple(parts)


def other_source(facts: Mapping[str, Any], text: str | None, fields: Sequence[str]) -> TextSource:
    """The source that a manifest's facts name, unless another text or other fields are named."""
    known = source_in(facts) if text is None else TextSource.of(text)
    return TextSource(known.parts, tuple(fields)) if fields else known


def source_in(facts: Mapping[str, Any]) -> TextSource:
    """The source that a manifest's facts name."""
    stored = facts.get("text_source")
    if stored is None:
        return TextSource.of(facts["text"])
    return TextSource(tuple((str(name), str(path)) for name, path in stored["parts"]), tuple(stored["fields"]))
