"""Compiled grammars in the engine: made elsewhere, where it can take long, and only followed here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ...errors import UsageError
from ..text.desk import grammar_vocabulary


class Grammars:
    """Matchers for requests whose answer must have a form."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> None:
        """tokenizer: None where there is none, and then no form can be asked for."""
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, sorted(eos)
        self._info: Any = None
        self._read = lru_cache(maxsize=16)(self._deserialized)

    def matcher(self, compiled: str) -> Any:
        """A new matcher at the grammar's beginning."""
        import xgrammar

        return xgrammar.GrammarMatcher(self._read(compiled))

    def _deserialized(self, compiled: str) -> Any:
        import xgrammar

        if self._tokenizer is None:
            raise UsageError("this engine has no tokenizer, which a form needs", "give one to Engine")
        if self._info is None:
            self._info = grammar_vocabulary(self._tokenizer, self._vocabulary, self._eos)
        return xgrammar.CompiledGrammar.deserialize_json(compiled, self._info)
