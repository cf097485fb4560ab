"""Shows routers that look at earlier tokens which tokens of a packed batch came before: `architectures.history` says what they keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...architectures.history import PackedText, PackedTexts, packed_batch
from ...errors import UsageError
from .paged_attention import PagedLayout, places


class EarlierTokens:
    """Of one model. attended: its routers look at the weights of attention."""

    def __init__(self, model: Any) -> None:
        self.model, self.packed = model, PackedTexts()
        self.attended = getattr(model.config, "neighbours_by", None) == "attention"

    @contextmanager
    def shown(self, layout: PagedLayout) -> Iterator[None]:
        """For a batch that lies like this."""
        layout.tells = self.attended
        page = layout.page
        texts = [PackedText(slice(s.start, s.start + s.queries), places(s, page, page)) for s in layout.segments]
        with packed_batch(self.model, self.packed, texts):
            yield


def earlier_tokens(model: Any, paged: bool) -> EarlierTokens | None:
    """None where routers look at a token alone. paged: whether our attention runs. UsageError where it must, and does not."""
    if not getattr(model, "looks_back", False):
        return None
    if not paged:
        raise UsageError(
            "routers of this model look at earlier tokens, which a server shows them in float32 on a CPU alone",
            "serve it there, run it with `moe-prism generate`, or measure it with `moe-prism frontier`",
        )
    return EarlierTokens(model)
