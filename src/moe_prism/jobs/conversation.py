"""A conversation with a model through its own chat template."""

from __future__ import annotations

from typing import Any

from ..data.chat import Chat
from ..data.fields import LeftOutError, Turns
from ..errors import UsageError


class Conversation:
    """Turns so far, and the prompt for the next answer. UsageError for a tokenizer without a chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._chat = Chat(tokenizer)
        if not self._chat.has_template:
            raise UsageError("the model has no chat template", "leave --chat out: it then continues the prompt")
        self._turns: list[dict[str, Any]] = []

    def ask(self, text: str) -> str:
        """The text up to where the answer to this begins, special tokens included. UsageError where the template refuses the turns."""
        self._turns.append({"role": "user", "content": text})
        try:
            return self._chat.write(Turns(tuple(self._turns)), for_answer=True)
        except LeftOutError as error:
            self._turns.pop()
            raise UsageError(f"the model's chat template refuses this: {self._chat.refusal}", "leave --chat out") from error

    def hear(self, text: str) -> None:
        """The answer, for the turns that follow."""
        self._turns.append({"role": "assistant", "content": text})

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._chat.close()
