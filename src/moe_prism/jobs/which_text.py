"""Which text a model is calibrated and judged on where nobody says, and whether that is the kind of text it was made for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..checkpoint import read_manifest
from ..checkpoint.companions import origin
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.shards import read_json
from ..data.bundled import BUNDLED, KINDS
from ..errors import CorruptError
from ..frontier import Frontier
from ..model import resolve
from ..options.text import TextSource, source_in

PYTHON, GENERAL = "stdlib", "domains"
CARD_BYTES, TOKENIZER_BYTES = 1 << 16, 1 << 26
SPOKEN = 0.25  # of the words of a vocabulary that are in other letters than Latin ones
FIELDS = {
    "math": ("math", "maths", "mathematics"),
    "medicine": ("medical", "biomedical", "medicine", "clinical", "biology"),
    "law": ("legal", "law"),
    "finance": ("finance", "financial"),
    "chemistry": ("chemistry", "molecule"),
}
Asked = TypeVar("Asked")


def with_text(options: Asked, model: str | Path) -> Asked:
    """The options of a job with its text filled in, where they name none: `default_source` of the model."""
    given: Any = options
    if given.text is not None or getattr(given, "domains", None) or getattr(given, "tasks", None):
        return options
    found = default_source(model)
    fields = list(found.fields) or given.text_field
    if found.domains and hasattr(given, "domains"):
        named = [f"{name}={path}" for name, path in found.parts]
        return replace(given, domains=named, text_field=fields)  # type: ignore[no-any-return]
    text = GENERAL if found.domains else found.parts[0][1]
    return replace(given, text=text, text_field=fields if text != GENERAL else given.text_field)  # type: ignore[no-any-return]


def default_source(model: str | Path) -> TextSource:
    """What a folder of ours was calibrated on, if that is here; Python for `nano`, else text of several kinds."""
    where = resolve(model, weights=False)
    if where.is_dir() and (where / MANIFEST).is_file():
        manifest = read_manifest(where)
        known = source_in(manifest["calibration"]) if "text" in manifest.get("calibration", {}) else None
        if known is not None and all(path in BUNDLED or Path(path).exists() for _, path in known.parts):
            return known
        return TextSource.of(PYTHON if manifest["source"]["name"] == "nano" else GENERAL)
    return TextSource.of(PYTHON if where == resolve("nano") else GENERAL)


def described(source: TextSource) -> str:
    """For people: the name, and what is behind it where we ship it."""
    return ", ".join(
        f"{name + '=' if name else ''}{path}" + (f" ({KINDS[path]})" if path in KINDS else "") for name, path in source.parts
    )


def texts_of(folder: str | Path) -> dict[str, str]:
    """What a folder says of the text that it was calibrated and measured on, "unknown" where it does not."""
    path, said = Path(folder), {"calibrated_on": "nothing", "measured_on": "nothing"}
    if (path / MANIFEST).is_file():
        facts = read_manifest(path).get("calibration", {})
        if "text" in facts:
            said["calibrated_on"] = _counted(facts)
    if (path / "frontier.json").is_file():
        try:
            said["measured_on"] = _counted(Frontier.load(path / "frontier.json").provenance.get("evaluation", {}))
        except CorruptError:  # told by whoever needs the points
            said["measured_on"] = "unknown"
    return said


def _counted(facts: Mapping[str, Any]) -> str:
    name = str(facts.get("text", "unknown text"))
    kind = f" ({KINDS[name]})" if name in KINDS else ""
    return f"{name}{kind}" + (f", {facts['tokens']} tokens" if "tokens" in facts else "")


def doubt(model: str | Path, source: TextSource) -> str | None:
    """A sentence where a model's card, name or vocabulary speaks of another kind of text than the shipped one it gets; else None."""
    if any(path not in BUNDLED for _, path in source.parts):
        return None
    reason = next(_signs(resolve(model, weights=False)), None)
    if reason is None:
        return None
    return f"{reason}, but the text is {described(source)}: name text like what it will read, with --text"


def _signs(where: Path) -> Iterator[str]:
    """What speaks for another domain, the strongest first."""
    card = _card(where)
    languages = [str(v).lower() for v in _listed(card.get("language"))]
    if languages and not {"en", "eng", "english", "code", "multilingual"} & set(languages):
        yield f"the model's card names the language {', '.join(languages[:3])[:60]}"
    words = {word for tag in _listed(card.get("tags")) for word in re.split(r"[^a-z]+", str(tag).lower())}
    words |= set(re.split(r"[^a-z]+", origin(where).lower()))
    for field, known in FIELDS.items():
        if words & set(known):
            yield f"the model's card or name speaks of {field}"
    share = _other_letters(where / "tokenizer.json") if where.is_dir() else 0.0
    if share > SPOKEN:
        yield f"{share:.0%} of the words of its tokenizer are in other letters than Latin ones"


def _listed(value: Any) -> list[Any]:
    return value[:256] if isinstance(value, list) else [value] if isinstance(value, str) else []


def _card(where: Path) -> Mapping[str, Any]:
    """The front matter of README.md; nothing where there is none that can be read."""
    try:
        with (where / "README.md").open("rb") as file:
            text = file.read(CARD_BYTES).decode("utf-8", "replace")
        found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _other_letters(tokenizer: Path) -> float:
    """Share of the vocabulary's words of letters that are in no Latin script. Byte-level vocabularies hide theirs: then 0."""
    try:
        if tokenizer.stat().st_size > TOKENIZER_BYTES:
            return 0.0
        vocabulary = read_json(tokenizer).get("model", {}).get("vocab", {})
    except (OSError, CorruptError, AttributeError):
        return 0.0
    listed = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry] if isinstance(vocabulary, list) else []
    words = list(vocabulary) if isinstance(vocabulary, dict) else listed
    if any(str(w).startswith("Ġ") for w in words[:2000]):
        words = [_from_bytes(str(w)) for w in words]
    letters = [w for w in map(str, words) if any(c.isalpha() for c in w)]
    return sum(any(c.isalpha() and ord(c) > 0x24F for c in w) for w in letters) / len(letters) if letters else 0.0


def _from_bytes(word: str) -> str:
    """A byte-level token as the text that it stands for."""
    from tokenizers.decoders import ByteLevel

    return str(ByteLevel().decode([word]))
