"""The same architecture with E N experts of f / N neurons, of which a token takes k N: what config.json then says, found by trying.

Shapes: E experts of f neurons, N sub-experts per expert, k experts per token, d hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...checkpoint import LayerStream
from ...checkpoint.config import empty_model, read_config
from ...checkpoint.convert import stored
from ...errors import UsageError
from ...model import MoELayer, find_layers
from ...model.router import COUNT_NAMES, TOP_K_NAMES, Router
from ..prune.remove import row_tensors
from ..prune.write import text_section
from ..slice.narrower import places

SHARED_NAMES = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""How many shared experts there are, where their width is a multiple of a routed one's."""
ADVICE = "keep the elastic form, which runs every family"


@dataclass(frozen=True)
class Sizes:
    """E, k and f of the source, and N."""

    experts: int
    per_token: int
    width: int
    n_sub: int


class ReslicedConfig:
    """raw: config.json with the new numbers. model: what it describes, empty; layers: its MoE layers, in the order of the source's."""

    def __init__(self, stream: LayerStream, layers: Sequence[MoELayer], sizes: Sizes) -> None:
        """UsageError where no number of config.json gives this form and leaves all other weights as they are."""
        self.stream, self.source_layers, self.sizes = stream, layers, sizes
        self._own = {
            name for layer in layers for owner in (layer.owners, row_tensors(Router(stream.model, layer))) for name in owner
        }
        why = f"config.json has no number {sizes.width} that is the width of experts"
        raw = stream.source.config()
        raw.pop("auto_map", None)
        for place in places(self._section(raw), sizes.width):
            for shared in (False, True):
                found = self._tried(raw, place, shared)
                if found is None:
                    return
                why = found
        raise UsageError(f"config.json cannot say this form: {why}", ADVICE)

    def _tried(self, raw: dict[str, Any], place: tuple[str, ...], shared: bool) -> str | None:
        """None if the number at `place` is the width of experts; else why it is not. shared: with more shared experts of less width."""
        n = self.sizes.n_sub
        self.raw = copy.deepcopy(raw)
        section = self._section(self.raw)
        self._set(section, COUNT_NAMES, self.sizes.experts)
        self._set(section, TOP_K_NAMES, self.sizes.per_token)
        part = section
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = self.sizes.width // n
        if shared:
            for key in SHARED_NAMES:
                if isinstance(section.get(key), int):
                    section[key] *= n
        try:
            config = read_config(self.stream.source.folder, self.raw)
            self.model: Any = empty_model(self.stream.source.folder, config, self.stream.dtype)
            self.layers = find_layers(self.model)
        except UsageError as error:
            return f"with '{place[-1]}' {self.sizes.width // n} it is no model, {error.cause}"
        return self._wrong(place[-1])

    def _set(self, section: dict[str, Any], names: Sequence[str], before: int) -> None:
        """N times the number that one of these names holds. UsageError where none does."""
        config = self.stream.model.config.get_text_config(decoder=True)
        keys = {config.attribute_map.get(name, name) for name in names if getattr(config, name, None) == before}
        keys |= {name for name in names if section.get(name) == before}
        if not keys:
            raise UsageError(f"config.json of '{config.model_type}' has no '{names[0]}' of {before}", ADVICE)
        section.update(dict.fromkeys(sorted(keys), before * self.sizes.n_sub))

    def _wrong(self, key: str) -> str | None:
        sizes = self.sizes
        wanted = [(x.name, sizes.experts * sizes.n_sub, sizes.width // sizes.n_sub) for x in self.source_layers]
        if [(x.name, x.num_experts, x.width) for x in self.layers] != wanted:
            return f"'{key}' is not the width of experts"
        before, after = (dict(self._others(model)) for model in (self.stream.model, self.model))
        changed = next((name for name in {**before, **after} if before.get(name) != after.get(name)), None)
        return f"'{changed}' changes with '{key}' as well" if changed else None

    def _others(self, model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Shapes of what is neither an expert's nor the router's."""
        for name, tensor in stored(model):
            if name not in self._own and not name.startswith(tuple(f"{x}." for x in self._own)):
                yield name, tuple(tensor.shape)

    def _section(self, raw: dict[str, Any]) -> dict[str, Any]:
        config = self.stream.model.config
        return text_section(config, config.get_text_config(decoder=True), raw)
