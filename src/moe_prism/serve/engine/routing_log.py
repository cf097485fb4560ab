"""What a running server's requests routed to, kept for `moe-prism offload fit` and `inspect --routing`: a trace of bounded size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...offload.record import TraceRecorder
from ...offload.trace import DECODE, FORMAT, PREFILL, Array, Trace
from .scheduler import PackedStep

logger = logging.getLogger(__name__)
UNKNOWN = -1  # token ids that were not asked for


class RoutingLog:
    """Records what steps route to until `most` tokens are held, then writes the trace and is done. In the engine's thread, but `close`.

    Rows of drafts, and of points whose stages change what the router chose, are left out; so are requests under way when it begins, whose
    prompt nobody saw. The first half of the requests is the trace's calibration side, what came later its evaluation side.
    """

    def __init__(self, model: Any, levels: list[Any], out: Path, most: int, *, ids: bool = False) -> None:
        """levels: operating points, by number; ids: keep token ids too."""
        self.model, self.out, self.most, self.ids = model, out, most, ids
        self._routed = [bool(point.routing) for point in levels]
        self._recorder: TraceRecorder | None = None
        self._seen: dict[str, tuple[int, int]] = {}  # request -> number, tokens so far
        self._late: set[str] = set()  # requests that ran before it began
        self._parts: list[dict[str, Array]] = []
        self._held = self._steps = 0
        self._done = False
        self._tokens: Tensor | None = None
        self._hook: Any = None

    def note(self, step: PackedStep | None) -> None:
        """After every step. The first one begins: before it, layers may have been in the middle of a step.

        None: something ran beside the batch, which is not recorded.
        """
        if self._done:
            return
        if self._recorder is None:
            self._begin()
            self._late = {part.request.job.id for part in step.parts} if step else set()
            return
        found = self._recorder.taken()
        if not found or step is None:
            return
        for part in step.parts:
            name, rows = part.request.job.id, slice(part.start, part.start + part.tokens)
            if name in self._late:
                continue
            number, at = self._seen.get(name, (len(self._seen), part.request.cached_tokens))
            self._seen[name] = number, at + part.lasting
            if part.draft is None and not self._routed[part.level]:
                self._keep(found, rows, (number, at, PREFILL if part.is_prompt else DECODE))
        self._steps += 1
        if self._held >= self.most:
            self.close()

    def close(self) -> None:
        """Write what there is, once; nothing is recorded afterwards."""
        if self._done:
            return
        self._done = True
        if self._recorder is not None:
            self._recorder.__exit__()
            self._hook.remove()
        if not self._parts:
            logger.warning("no routing was recorded", extra={"fields": {"file": str(self.out)}})
            return
        self._trace().save(self.out)
        logger.info("routing is recorded", extra={"fields": {"file": str(self.out), "tokens": self._held}})

    def _begin(self) -> None:
        self._recorder = TraceRecorder(self.model).__enter__()
        self._hook = self.model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found = named.get("input_ids")
        self._tokens = found.reshape(-1).cpu() if self.ids and isinstance(found, Tensor) else None

    def _keep(self, found: dict[str, Array], rows: slice, what: tuple[int, int, int]) -> None:
        number, at, phase = what
        count = min(rows.stop - rows.start, self.most - self._held)
        if count <= 0:
            return
        rows = slice(rows.start, rows.start + count)
        k = found["expert_ids"].shape[2]
        mine = {name: array[rows, :, :k].copy() for name, array in found.items()}
        tokens = torch.full((count,), UNKNOWN) if self._tokens is None else self._tokens[rows]
        mine |= {"position": np.arange(at, at + count, dtype=np.int32), "token": tokens.numpy().astype(np.int32)}
        for name, value, kind in (("request", number, np.int32), ("phase", phase, np.int8), ("step", self._steps, np.int32)):
            mine[name] = np.full(count, value, kind)
        self._parts.append(mine)
        self._held += count

    def _trace(self) -> Trace:
        arrays = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        assert self._recorder is not None
        layers = self._recorder.layers
        _, number = np.unique(arrays["request"], return_inverse=True)
        arrays["side"] = (2 * number > number.max()).astype(np.int8)
        header = {
            "format": FORMAT,
            "layers": len(layers),
            "experts": max(layer.num_experts for layer in layers),
            "k": int(arrays["expert_ids"].shape[2]),
            "n_sub": self._recorder.n_sub,
            "model": str(getattr(self.model.config, "_name_or_path", "") or "a server"),
            "text": "requests of a server",
            "token_ids": self.ids,
        }
        return Trace(header, **arrays)
