"""Write docs/reference/requests.md from the table of request fields: `make reference`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..files import replace_file
from ..jobs.reference import EDITED
from .http.fields import OPENAI, OURS, REFUSED, VLLM, WITHOUT_EFFECT, Endpoint
from .http.protocol import REQUESTS

PAGE = "requests.md"
IN_VLLM = {
    **dict.fromkeys(("quality", "min_quality"), "in `vllm_xargs`"),
    **dict.fromkeys(("class", "ttft_ms", "tpot_ms"), "in `vllm_xargs`: 400"),
    "priority": "taken, where vLLM schedules by priority",
    "tools": "taken; `tool_choice` auto needs vLLM's own options",
    "logprobs": "taken",
}
"""Where vLLM takes a field of ours in another way."""


@dataclass(frozen=True)
class FieldRow:
    """One field of one endpoint. does: done, refused or without effect; check: what it may hold."""

    name: str
    does: str
    check: str
    meaning: str
    of: str
    vllm: str


def rows(endpoint: Endpoint) -> list[FieldRow]:
    """Every field that OpenAI's endpoint, vLLM's or ours has, in that order."""
    made = REQUESTS[endpoint]
    done = {field.alias or name: field for name, field in made.model_fields.items()}
    schema = made.model_json_schema(by_alias=True)
    names = [*dict.fromkeys([*done, *sorted(OPENAI[endpoint] | VLLM[endpoint])])]
    out = []
    for name in names:
        if name in done:
            does, check = "done", _check(schema["properties"][name], schema["$defs"])
            meaning = done[name].description or ""
        elif name in WITHOUT_EFFECT:
            does, check, meaning = "without effect", "", WITHOUT_EFFECT[name].why
        else:
            does, check, meaning = "refused", _neutral(name), REFUSED[name].why
        out.append(FieldRow(name, does, check, meaning, _of(name, endpoint), _vllm(name, endpoint)))
    return out


def _of(name: str, endpoint: Endpoint) -> str:
    sources = {"OpenAI": OPENAI[endpoint], "vLLM": VLLM[endpoint], "moe-prism": OURS}
    return ", ".join(source for source, names in sources.items() if name in names) or "moe-prism"


def _vllm(name: str, endpoint: Endpoint) -> str:
    return IN_VLLM.get(name, "taken" if name in VLLM[endpoint] else "ignored")


def _neutral(name: str) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in REFUSED[name].neutral)


def _check(said: dict[str, Any], defs: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in said:
        return "object"
    for key in ("anyOf", "oneOf"):
        if key in said:
            members = [_check(member, defs) for member in said[key] if member.get("type") != "null"]
            return " or ".join(dict.fromkeys(members))
    if "enum" in said or "const" in said:
        return ", ".join(f"`{json.dumps(value)}`" for value in said.get("enum", [said.get("const")]))
    kind = str(said.get("type", "any"))
    least = said.get("minimum", said.get("exclusiveMinimum"))
    if "maximum" in said:
        return f"{kind}, {'above ' if 'exclusiveMinimum' in said else ''}{_short(least)} to {_short(said['maximum'])}"
    size = said.get("maxLength", said.get("maxItems", said.get("maxProperties")))
    return kind + (f", at most {_short(size)}" if size else "")


def _short(number: float | None) -> str:
    """A bound, exactly: a power of two, or one short of it, by its exponent. An older pydantic gives whole numbers as floats."""
    if number is None:
        return "any"
    if number != int(number) or abs(number) < 1 << 16:
        return f"{number:g}"
    whole, sign = abs(int(number)), "-" if number < 0 else ""
    for less in (0, 1):
        if (whole + less).bit_count() == 1:
            return f"{sign}2^{(whole + less).bit_length() - 1}{' - 1' * less}"
    return f"{sign}{whole:,}"


def page() -> str:
    """docs/reference/requests.md."""
    parts = [
        EDITED,
        "",
        "# Request fields",
        "",
        "One rule: a field that would change the answer is done, or refused with 400 and its name. A field without effect is ignored,",
        "and the header `x-moe-prism-ignored` lists it. A field that nobody knows is refused too, with the nearest name. `null` means",
        "left out.",
        "",
        "[The server reference](serving.md) has bounds, answers and errors.",
        "",
        "The column *vLLM* says what `--engine vllm` does with the field. vLLM takes it by its own checks, or ignores what it does",
        "not know.",
    ]
    for endpoint in get_args(Endpoint):
        found = rows(endpoint)
        path = "/v1/completions" if endpoint == "completions" else "/v1/chat/completions"
        parts += ["", f"## `{path}`", "", "| field | of | value | what it does | vLLM |", "|---|---|---|---|---|"]
        parts += [_line(row.name, row.of, row.check, row.meaning, row.vllm) for row in found if row.does == "done"]
        parts += ["", "Refused, unless the value asks for nothing:", ""]
        parts += ["| field | of | taken values | why | vLLM |", "|---|---|---|---|---|"]
        parts += [_line(row.name, row.of, row.check, row.meaning, row.vllm) for row in found if row.does == "refused"]
        parts += ["", "Without effect:", "", "| field | of | why | vLLM |", "|---|---|---|---|"]
        parts += [_line(row.name, row.of, row.meaning, row.vllm) for row in found if row.does == "without effect"]
    return "\n".join(parts) + "\n"


def _line(name: str, *cells: str) -> str:
    return f"| `{name}` | " + " | ".join(cells) + " |"


def write_page(folder: Path) -> None:
    """Into docs/reference."""
    replace_file(folder / PAGE, page().encode())


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
