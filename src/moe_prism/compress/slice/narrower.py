"""The same architecture with narrower experts: which number of config.json says their width, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ...checkpoint import LayerStream
from ...checkpoint.config import empty_model, read_config
from ...checkpoint.convert import stored
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ..prune.write import text_section

OTHERWISE = "use --widths own, which changes no shape"


class Narrower:
    """raw: config.json with the new width. model: what it describes, empty; layers: its MoE layers, in the order of the source's."""

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer], width: int) -> None:
        """UsageError where no single number gives every expert that width and leaves all other weights as they are."""
        widths = sorted({layer.width for layer in layers})
        if len(widths) > 1:
            raise UsageError(f"experts are {widths[0]} to {widths[-1]} neurons wide, by layers", OTHERWISE)
        raw = stream.source.config()
        raw.pop("auto_map", None)
        self.raw, why = raw, f"config.json has no number {widths[0]} that is the width of experts"
        for place in places(_section(stream, raw), widths[0]):
            self.raw = copy.deepcopy(raw)
            section = _section(stream, self.raw)
            for key in place[:-1]:
                section = section[key]
            section[place[-1]] = width
            try:
                config = read_config(stream.source.folder, self.raw)
                self.model: Any = empty_model(stream.source.folder, config, stream.dtype)
                self.layers = find_layers(self.model)
            except UsageError as error:
                why = f"with '{place[-1]}' {width} it is no model: {error.cause}"
                continue
            wrong = self._wrong(stream.model, layers, width)
            if wrong is None:
                return
            why = f"'{wrong}' changes with '{place[-1]}' as well" if wrong else why
        raise UsageError(why, OTHERWISE)

    def _wrong(self, source: nn.Module, layers: Sequence[MoELayer], width: int) -> str | None:
        """None if only experts became narrower, all of them; else a tensor that changed beside them, or "" where it is another number."""
        if [(x.name, x.num_experts, x.width) for x in self.layers] != [(x.name, x.num_experts, width) for x in layers]:
            return ""
        owned = tuple(f"{owner}." for layer in layers for owner in layer.owners)
        before = {name: tuple(t.shape) for name, t in stored(source) if not name.startswith(owned)}
        after = {name: tuple(t.shape) for name, t in stored(self.model) if not name.startswith(owned)}
        return next((name for name in {**before, **after} if before.get(name) != after.get(name)), None)


def _section(stream: LayerStream, raw: dict[str, Any]) -> dict[str, Any]:
    config = stream.model.config
    return text_section(config, config.get_text_config(decoder=True), raw)


def places(section: dict[str, Any], width: int) -> Iterator[tuple[str, ...]]:
    """Where a section says this number, or a part of it does; what is named after experts first."""
    found = [(key,) for key, value in section.items() if value == width and isinstance(value, int)]
    parts = [(key, part) for key, part in section.items() if isinstance(part, dict)]
    found += [(key, inner) for key, part in parts for inner, value in part.items() if value == width and isinstance(value, int)]  # type: ignore[misc]
    yield from sorted(found, key=lambda place: not any(word in place[-1] for word in ("moe", "expert")))
