"""What a tokenizer's tokens are made of: their bytes, their names, and which of them are special."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

PARTIAL = "bytes:"
"""Begins the name of a token that is no whole text, as OpenAI's completions write it: bytes:\\xf0\\x9f."""


class Spelling(NamedTuple):
    """One token. data: its bytes in the text; none of a special token that is hidden, and none of an id that the tokenizer has not."""

    name: str
    data: bytes


class Vocabulary:
    """Looks tokens up by id. exact: text is the tokens' bytes joined; else a token's text depends on its neighbours."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        """size: ids that the model can draw, which may be more than the tokenizer knows."""
        self.tokenizer, self.size = tokenizer, size
        self._added = {int(i): token for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        self.special = frozenset(i for i, token in self._added.items() if token.special)
        self.by_name = {str(self._added[i]): i for i in self.special}
        self._form = _form(tokenizer)
        self.plain = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None) is None
        self.exact = self._form is not None
        self.strips = bool(self._form and self._form.strips)
        self._pieces: dict[int, Spelling] = {}
        self.longest = max((len(self._spell(i)) for i in range(self.size)), default=1) or 1
        """Bytes of the longest token."""

    def piece(self, token: int) -> Spelling:
        """Name and bytes of a token."""
        found = self._pieces.get(token)
        if found is None:
            data = self._spell(token)
            found = self._pieces[token] = Spelling(self._name(token, data), data)
        return found

    def _name(self, token: int, data: bytes) -> str:
        try:
            return data.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return PARTIAL + "".join(f"\\x{b:02x}" for b in data)

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        written = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(written, str):
            return b""  # rows of the model above the tokenizer's last id
        if self._form is None:
            return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()
        return self._form.spell(written)


class _ByteLevel(NamedTuple):
    """Every byte is written as one printable letter."""

    strips: bool = False

    def spell(self, written: str) -> bytes:
        letters = _letters()
        if all(letter in letters for letter in written):
            return bytes(letters[letter] for letter in written)
        return written.encode()


class _Spaces(NamedTuple):
    """A letter stands for the space, and <0xF0> for a byte where falls_back is set; the first space of a text may go."""

    space: str
    falls_back: bool
    strips: bool

    def spell(self, written: str) -> bytes:
        if self.falls_back and len(written) == 6 and written.startswith("<0x") and written.endswith(">"):
            return bytes([int(written[3:5], 16)])
        return written.replace(self.space, " ").encode()


def _form(tokenizer: Any) -> _ByteLevel | _Spaces | None:
    """How tokens are written, from the tokenizer's decoder; None where a token's text depends on its neighbours."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    said = json.loads(decoder.__getstate__())
    steps = said["decoders"] if said["type"] == "Sequence" else [said]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevel()
    if kinds == ["Metaspace"]:
        return _Spaces(steps[0]["replacement"], False, steps[0].get("prepend_scheme") != "never")
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and kinds.count("Replace") == 1:
        replaced = steps[kinds.index("Replace")]
        letter = replaced["pattern"].get("String")
        if letter and replaced["content"] == " ":
            return _Spaces(letter, "ByteFallback" in kinds, "Strip" in kinds)
    return None


@cache
def _letters() -> dict[str, int]:
    """letter -> byte of byte-level tokenizers: printable bytes are themselves, the others come after 255 in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}
