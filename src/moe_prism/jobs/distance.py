"""How far one checkpoint is from another, a layer of each in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import LayerStream
from ..data import Windows, token_windows
from ..errors import UsageError
from ..frontier.measure import Quality
from ..model import load_model, load_tokenizer
from ..options.text import TextSource

TOKENS = 2048
LOGITS = 1 << 26  # of one model, held while the other runs: 256 MiB in float32


def distance_between(source: str | Path, other: str | Path, ids: Tensor) -> Quality:
    """Quality of `other` on windows ids [n, length], with `source` as the full model; both in float32.

    As many windows are used as LOGITS allows, at least one.
    """
    length = ids.shape[1]
    with torch.no_grad():
        with _running(source) as model:
            ids = ids[: max(1, LOGITS // (length * int(model.config.get_text_config().vocab_size)))]
            wanted = _logits(model, ids).log_softmax(-1)
        with _running(other) as model:
            found = _logits(model, ids)
    quality = Quality()
    for one, two, target in zip(wanted, found, ids[:, 1:], strict=True):
        quality.add(one, two, target)
    return quality


def evaluation_windows(model: Path, text: str | TextSource, length: int) -> Windows | None:
    """Held-out windows of the text that a model was calibrated on; None where there is not enough of it."""
    try:
        return token_windows(load_tokenizer(model), text, "evaluation", length=length, tokens=TOKENS)
    except UsageError:
        return None


@contextmanager
def _running(where: str | Path) -> Iterator[Any]:
    """A model ready for forward passes: of a folder a layer at a time, of a GGUF file as a whole."""
    if Path(where).is_file():
        yield load_model(where, torch.float32)
        return
    with LayerStream(where, torch.float32).streaming() as model:
        yield model


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[n, length - 1, V]."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # type: ignore[no-any-return]
