"""Layers for multi-token prediction: in the files, with experts like the others', but not in the model that transformers builds.

Names tell them: `mtp.layers.0.mlp.experts...`, or `model.layers.N...` after the last layer. Each of their tensors has a counterpart in
the last MoE layer, of the same name behind the layer's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os.path import commonprefix
from typing import NamedTuple

from torch import Tensor

from ..errors import CorruptError, UsageError
from .stream import LayerStream

NAMED = re.compile(r"(^|[._])(mtp|nextn)")
CONFIG_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")
CHOICE = "choose --mtp prune (the same experts go as in the last layer), drop (such layers go) or keep (they stay whole)"


class MTPLayer(NamedTuple):
    """root: what the names of all its tensors begin with. tails: its tensors that the last MoE block has too -> their name in a block."""

    root: str
    tensors: tuple[str, ...]
    tails: dict[str, str]


def mtp_layers(stream: LayerStream, block: Iterable[str]) -> list[MTPLayer]:
    """Those with experts. block: names on disk of the experts and router of the last MoE layer.

    UsageError where one holds its experts in another form than the block does.
    """
    prefix, tails = block_tails(block)
    patterns = {_pattern(tail) for tail in tails}
    unread = set(stream.unused)
    read = {start for name in stream.source.names() if name not in unread for start in _starts(name)}
    roots: dict[str, list[str]] = {}
    for name in stream.unused:
        root = _root(name, read)
        if NAMED.search(root) or _pattern(prefix).startswith(_pattern(root)):
            roots.setdefault(root, []).append(name)
    found = []
    for root, names in roots.items():
        twins = {name: tail for name in names if (tail := _tail(name, patterns))}
        strange = [name for name in names if re.search(r"\bexperts\b", name) and "shared" not in name and name not in twins]
        if strange and not any(".experts." in name or "router" in name for name in twins):
            raise UsageError(
                f"'{strange[0]}' of an MTP layer has another form than the experts of the layers",
                "remove it, or prune the model it belongs to",
            )
        if twins:
            found.append(MTPLayer(root, tuple(names), twins))
    return found


def block_tails(block: Iterable[str]) -> tuple[str, dict[str, str]]:
    """What the names of a block's tensors begin with, and {the rest of the name: the name}."""
    names = list(block)
    prefix = commonprefix(names).rpartition(".")[0] + "."  # noqa: RUF071 - names, not paths
    return prefix, {name.removeprefix(prefix): name for name in names}


def check_mtp(stream: LayerStream, block: Iterable[str], kept_whole: bool) -> str:
    """CorruptError where an MTP layer has not the shapes of the last MoE layer; returns what `verify` says of them, "" if there are none.

    kept_whole: it was asked to stay as it is in a model with fewer experts.
    """
    block = list(block)
    tails = block_tails(block)[1]
    layers = mtp_layers(stream, block)
    for layer in layers:
        prefixes = {name.removesuffix(tail) for name, tail in layer.tails.items()}
        wanted = {start + tail: stream.source.info(name).shape for start in prefixes for tail, name in tails.items()}
        here = {name: stream.source.info(name).shape for name in layer.tails}
        wrong = sorted(name for name in wanted.keys() | here.keys() if wanted.get(name) != here.get(name))
        if wrong and not kept_whole:
            what = f"is {list(here[wrong[0]])}" if wrong[0] in here else "is missing"
            fits = f"{list(wanted[wrong[0]])} by the last layer" if wrong[0] in wanted else "no layer has it"
            raise CorruptError(
                f"tensor '{wrong[0]}' of an MTP layer {what}, {fits}", "prune the source again with --mtp prune or drop"
            )
    return ", ".join(layer.root.rstrip(".") for layer in layers)


class MTPEdit:
    """The tensors of MTP layers with fewer experts: by name in the output, what they are made of."""

    def __init__(
        self, stream: LayerStream, block: Iterable[str], shapes: dict[str, tuple[int, ...]], kept: tuple[int, ...]
    ) -> None:
        """shapes: of the block's tensors after the edit, by name; kept: the ids that stay."""
        self.stream, self.kept = stream, kept
        block = list(block)
        self.layers = mtp_layers(stream, block)
        self._made: dict[str, tuple[str, tuple[int, ...]]] = {}  # name -> (tensor it comes from, its shape)
        self.names = {name for layer in self.layers for name in layer.tails}
        _, tails = block_tails(block)
        for layer in self.layers:
            for start in sorted({name.removesuffix(tail) for name, tail in layer.tails.items()}):
                lost = next((start + tail for tail in tails if start + tail not in layer.tails), None)
                if lost:
                    raise CorruptError(f"tensor '{lost}' of an MTP layer is missing", "use a whole source, or --mtp drop")
                for new, old in moved(tails, kept):
                    self._made[start + new] = (start + old, shapes[tails[new]])

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape in the output, None if it leaves."""
        return self._made[name][1] if name in self._made else None

    def tensor(self, name: str) -> Tensor:
        """Its values in the output."""
        made_of, shape = self._made[name]
        tensor = self.stream.source.stored(self.stream.source.info(made_of))
        for dim, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
            if old != new:  # E experts of old / E rows each
                parts = tensor.reshape(*tensor.shape[:dim], -1, new // len(self.kept), *tensor.shape[dim + 1 :])
                tensor = parts[(slice(None),) * dim + (list(self.kept),)].flatten(dim, dim + 1)
        return tensor


def moved(tails: Iterable[str], kept: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """(name in the output, name in the source) of a block's tensors when only these experts stay."""
    forms: dict[str, list[str]] = {}
    for tail in tails:
        forms.setdefault(_pattern(tail), []).append(tail)
    for same in forms.values():
        if len(same) == 1:
            yield same[0], same[0]
            continue
        by_id = {_number(tail, same): tail for tail in same}
        yield from ((by_id[j], by_id[e]) for j, e in enumerate(kept))


def _number(tail: str, same: list[str]) -> int:
    """The expert's id: of the numbers in the name the one that is not the same in all names of this form."""
    columns = list(zip(*(re.findall(r"\d+", other) for other in same), strict=True))
    place = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
    return int(re.findall(r"\d+", tail)[place])


def _tail(name: str, patterns: set[str]) -> str | None:
    """The end of the name that a block's tensor has as well."""
    parts = name.split(".")
    return next((tail for i in range(1, len(parts)) if _pattern(tail := ".".join(parts[i:])) in patterns), None)


def _starts(name: str) -> list[str]:
    """All beginnings of a name, whole words."""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]


def _root(name: str, read: set[str]) -> str:
    """The shortest beginning of the name that no tensor of the model shares."""
    return next((root for root in _starts(name) if root not in read), name)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)
