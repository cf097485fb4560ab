"""What routers that look at earlier tokens keep of them: in the cache of attention, behind the layers' own entries.

A server's batch is one row of texts that stand behind each other, and its cache is in pages. What is kept lies at the places of the keys
and values there (`PackedTexts`), and every text is shown to the router alone. Shapes: B texts, L tokens of this call, S tokens so far, n
numbers of a token, T tokens of a batch, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..cache_names import given_cache
from ..errors import UsageError

ADVICE = "run it with transformers' ordinary cache, or without one"


class Earlier(NamedTuple):
    """values [B, S, n] of all tokens so far; seen [B or 1, L, S]: which of them a token may look at, itself included."""

    values: Tensor
    seen: Tensor


class PackedText(NamedTuple):
    """One text of a packed batch. rows: where its tokens are; places [S]: of all its tokens so far, those of the rows last."""

    rows: slice
    places: Tensor


class PackedTexts:
    """The texts of the batch that runs, and what is kept of all tokens by their place."""

    def __init__(self) -> None:
        self.texts: Sequence[PackedText] = ()
        self.notes: dict[int, Tensor] = {}  # [places, n] of every history

    def add(self, of: int, values: Tensor, places: Tensor) -> Tensor:
        """Note values [L, n] at the last of places [S]; the values of all of them [S, n]."""
        notes, most = self.notes.get(of), int(places.max()) + 1
        if notes is None or len(notes) < most:
            wider = values.new_zeros(max(most, 0 if notes is None else 2 * len(notes)), values.shape[1])
            if notes is not None:
                wider[: len(notes)] = notes
            notes = self.notes[of] = wider
        notes[places[-len(values) :]] = values
        return notes[places]


class TokenHistory:
    """Of one layer. It notes, before a layer's attention runs, its cache and its mask, and after it the weights that it gives.

    A block that is run without its attention has no history: its tokens are one text, and no cache keeps them.
    """

    def __init__(self, attention: nn.Module, index: int, layers: int) -> None:
        self.place = layers + index
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.attended: Any = None
        self.packed: PackedTexts | None = None
        self.text = 0  # of the packed ones, that the router looks at
        attention.register_forward_pre_hook(self._before, with_kwargs=True)
        attention.register_forward_hook(self._after)

    def _before(self, _module: nn.Module, _given: Any, named: dict[str, Any]) -> None:
        self.cache, self.mask = given_cache(named), named.get("attention_mask")

    def _after(self, _module: nn.Module, _given: Any, output: Any) -> None:
        self.attended = output[1]

    def weights(self) -> Tensor | None:
        """What attention gave for these tokens [B, H, L, S]; None where it did not run."""
        found: Tensor | None
        if self.packed is not None:
            found = None if self.attended is None else self.attended[self.text]
            return found
        found, self.attended = self.attended, None
        return found

    def each(self, packed: PackedTexts) -> Iterator[slice]:
        """The rows of every packed text, which `add` and `weights` speak of until the next one."""
        for self.text, text in enumerate(packed.texts):
            yield text.rows

    def add(self, values: Tensor) -> Earlier:
        """Note values [B, L, n] of these tokens. UsageError where the cache has not kept all tokens before."""
        length, cache, mask = values.shape[1], self.cache, self.mask
        self.cache = self.mask = None
        if self.packed is not None:
            values, cache, mask = self.packed.add(self.place, values[0], self.packed.texts[self.text].places)[None], None, None
        if cache is not None:
            if not hasattr(cache, "layers"):
                raise UsageError("a router of this model looks at earlier tokens, which this cache does not hold", ADVICE)
            while len(cache.layers) <= self.place:
                cache.layers.append(DynamicLayer())
            values = cache.update(values[:, None], values[:, None, :, :0], self.place)[0][:, 0]
        size = values.shape[1]
        if mask is None:
            return Earlier(values, torch.ones(length, size, dtype=torch.bool, device=values.device).tril(size - length)[None])
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
        if seen.shape[-2:] != (length, size):
            raise UsageError("a router of this model looks at earlier tokens, and the cache has dropped some", ADVICE)
        own = torch.eye(length, size, dtype=torch.bool, device=values.device).roll(size - length, 1)
        return Earlier(values, seen | own)  # a padding token sees itself at least, so that no row is empty


class LookingModule(nn.Module):
    """A router, or a part of one, that looks at earlier tokens: a subclass says how, in `look`."""

    history: TokenHistory

    def look(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, L, d] -> what is said of every token [B L, ...]; of a router logits [B L, C], weights [B L, k] and ids [B L, k]."""
        raise NotImplementedError(type(self).__name__)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """As `look`; of a packed batch [1, T, d] one text after the other."""
        packed = self.history.packed
        if packed is None:
            return self.look(x)
        found = [self.look(x[:, rows]) for rows in self.history.each(packed)]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@contextmanager
def packed_batch(model: nn.Module, packed: PackedTexts, texts: Sequence[PackedText]) -> Iterator[None]:
    """Run a batch of these texts, behind each other in one row, in the block."""
    histories = [module.history for module in model.modules() if isinstance(module, LookingModule)]
    packed.texts = texts
    for history in histories:
        history.packed = packed
    try:
        yield
    finally:
        for history in histories:
            history.packed = history.attended = None
