"""vLLM's own scheduler, which decides who runs, and a level for each request, which we decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UsageError
from . import compat
from .levels import SECTION, Menu, QualityRange

CARRIED = "moe_prism_levels"
"""Attribute of SchedulerOutput: level of every request of the step that is below full. Absent if there is none."""


class PrismScheduler(compat.name("AsyncScheduler")):  # type: ignore[misc]
    """Everybody runs at the quality asked for; while requests wait that did not fit into the step, at the least they allow."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        options = dict(self.vllm_config.additional_config.get(SECTION, {}))
        options.pop("wired", None)
        self.menu = Menu.of(Path(self.vllm_config.model_config.model), options)
        self.wishes: dict[str, QualityRange] = {}

    def add_request(self, request: Any) -> None:
        """Note the levels, and give each floor its own prefix cache: what was computed for less must not serve more."""
        self.wishes[request.request_id] = wish = self._wish(request)
        if wish.floor < self.menu.ladder.top and getattr(request, "_block_hasher", None) is not None:
            request.cache_salt = f"{request.cache_salt or ''}|moe-prism {self.menu.ladder.levels[wish.floor].point.to_json()}"
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def _wish(self, request: Any) -> QualityRange:
        """Bad fields were refused at the door (`check`); nobody could be told here, and full budget is always right."""
        fields = (request.sampling_params and request.sampling_params.extra_args) or {}
        try:
            return self.menu.read(fields)
        except UsageError:
            return QualityRange(self.menu.ladder.top, self.menu.ladder.top)

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        output = super().schedule(*arguments, **named)
        crowded = bool(self.waiting)
        levels = {}
        for id in output.num_scheduled_tokens:
            level = self.wishes[id].floor if crowded else self.wishes[id].ceiling
            if level < self.menu.ladder.top:
                levels[id] = level
        if levels:
            setattr(output, CARRIED, levels)
        for id in output.finished_req_ids:
            self.wishes.pop(id, None)
        return output
