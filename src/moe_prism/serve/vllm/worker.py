"""vLLM's CPU worker, which tells the layers the level of every row of a step.

Nothing that compiles with numba may be imported before the worker has started: vLLM then looks through every module's objects for
kernels to replace, and the one that llvmlite uses for its library answers to any attribute name, which that search does not survive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...elastic.bind import Bound, Step
from ...elastic.control import Past
from ...elastic.paged_past import PagedStates, RequestSpan
from . import compat
from .scheduler import CARRIED
from .state import STEP


class RowLevels:
    """Mixed into vLLM's model runner: the order of the rows of a step is final only just before its forward."""

    moe_prism_step: tuple[dict[str, int], dict[str, int]] | None = None
    """(level of each request that is below full, tokens of each request)."""
    moe_prism_top: int = 0
    moe_prism_bound: Bound | None = None
    moe_prism_states: PagedStates | None = None

    def _model_forward(self, *arguments: Any, **named: Any) -> Any:
        if self.moe_prism_step is not None:
            levels, tokens = self.moe_prism_step
            ids: list[str] = self.input_batch.req_ids  # type: ignore[attr-defined]
            rows = np.repeat([levels.get(id, self.moe_prism_top) for id in ids], [tokens.get(id, 0) for id in ids])
            level = torch.from_numpy(rows.astype(np.int64))
            STEP.level = level if levels else None
            if self.moe_prism_bound is not None and self.moe_prism_bound.holds:
                STEP.past = self._past(Step(self.moe_prism_bound, level), [tokens.get(id, 0) for id in ids])
        return super()._model_forward(*arguments, **named)  # type: ignore[misc]

    def _past(self, step: Step, tokens: list[int]) -> Past:
        """What the requests of the step have had so far, beside their keys and values: also of those at the full model, who may go on
        with less.
        """
        batch = self.input_batch  # type: ignore[attr-defined]
        table = batch.block_table[0]
        if self.moe_prism_states is None or self.moe_prism_states.page != table.block_size:
            self.moe_prism_states = PagedStates(table.block_size, len(step.bound.groups[0].budgets[0]))
        before, blocks = batch.num_computed_tokens_cpu, table.get_numpy_array()
        return self.moe_prism_states.past(step, [RequestSpan(int(before[i]), n, blocks[i]) for i, n in enumerate(tokens)])


class PrismWorker(compat.name("CPUWorker")):  # type: ignore[misc]
    """Without levels on the SchedulerOutput, a step is exactly the stock worker's."""

    def init_device(self) -> None:
        super().init_device()
        stock = type(self.model_runner)
        self.model_runner.__class__ = type("PrismRunner", (RowLevels, stock), {})

    def load_model(self, *arguments: Any, **named: Any) -> None:
        super().load_model(*arguments, **named)
        from .install import install

        ladder, bound = install(self.model_runner.get_model(), self.vllm_config)
        self.model_runner.moe_prism_top, self.model_runner.moe_prism_bound = ladder.top, bound

    def execute_model(self, scheduler_output: Any) -> Any:
        levels = getattr(scheduler_output, CARRIED, None)
        bound = self.model_runner.moe_prism_bound
        known = levels or (bound is not None and bound.holds)
        self.model_runner.moe_prism_step = (levels or {}, scheduler_output.num_scheduled_tokens) if known else None
        try:
            return super().execute_model(scheduler_output)
        finally:
            STEP.level = STEP.past = None
