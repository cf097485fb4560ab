"""The loop: a step is drawn, run, and its losses added up; the state of a run is plain tensors.

A step's text, draws and rates follow from the seed and its number. So a run that was killed goes on from its last state to the same
losses, to the bit, with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.base import LayerRouting, StepPlace, StepSeen, TrainingPart, TrainingTask
from ..errors import CorruptError, PrismError
from ..schema.training import TrainingForm
from .batches import Batches, RowBatches
from .exchange import Exchange
from .experts import training_experts
from .muon import Muon, learning_rate
from .next_token import NextToken
from .processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
WEIGHT_DECAY, DECAY_REST = 0.02, 0.01
BETAS = (0.9, 0.95)
NOT_MATRICES = ("embed", "lm_head", ".gate.", "shared_expert_gate")
"""Of a few rows each, or read a row at a time: AdamW's."""


@dataclass
class Curve:
    """Losses of a run, in the unit of its task. train: of every step; held: (steps done, loss) on held-out examples."""

    train: list[float] = field(default_factory=list)
    held: list[tuple[int, float]] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """As a state keeps it."""
        return {
            "curve.train": torch.tensor(self.train, dtype=torch.float64),
            "curve.held": torch.tensor(self.held, dtype=torch.float64).reshape(-1, 2),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Curve:
        """From a state."""
        held = [(int(step), loss) for step, loss in tensors["curve.held"].tolist()]
        return cls(tensors["curve.train"].tolist(), held)

    def to_json(self) -> dict[str, Any]:
        return {"train": self.train, "held_out": [{"step": step, "loss": loss} for step, loss in self.held]}


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Every matrix anew, by fan-in: half as large where it writes to the residual stream, the embedding with a spread of one half."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        writes = any(word in name for word in ("down", "o_proj", "lm_head"))
        spread = 0.5 if "embed" in name else p.shape[-1] ** -0.5 * (0.5 if writes else 1.0)
        p.copy_(torch.randn(p.shape, generator=generator) * spread)


class Recorder:
    """Notes what every router says while it is on: modules called `gate` that give (logits, weights, ids)."""

    def __init__(self, model: nn.Module) -> None:
        self.on, self.found = False, list[LayerRouting]()
        gates = [m for n, m in model.named_modules() if n.endswith(".gate") and hasattr(m, "top_k")]
        self.handles = [gate.register_forward_hook(self._note) for gate in gates]

    def _note(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.on:
            logits, weights, ids = output[:3]
            self.found.append(LayerRouting(logits.flatten(0, -2), weights, ids))

    @contextmanager
    def recording(self) -> Iterator[list[LayerRouting]]:
        """Inside, the list that is yielded gets what every router says, in the order of the layers."""
        self.on, self.found = True, []
        try:
            yield self.found
        finally:
            self.on = False

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class Training:
    """A model under training: its optimisers, its place and its curve.

    data: what is trained on and what is judged by, as the task takes them: ids [n] for the next token. task: None for that.
    """

    def __init__(
        self,
        recipe: TrainingForm,
        model: Any,
        parts: Sequence[TrainingPart],
        data: tuple[Tensor, Tensor],
        task: TrainingTask | None = None,
    ) -> None:
        self.recipe, self.model, self.parts, self.processes = recipe, model, list(parts), Processes()
        self.task = task or NextToken(recipe.length)
        train, self.held = data
        for part in self.parts:
            part.start(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.matrices = {n: p for n, p in trained.items() if p.ndim >= 2 and not any(word in n for word in NOT_MATRICES)}
        self.others = {n: p for n, p in trained.items() if n not in self.matrices}
        self.muon = Muon(self.matrices)
        self.rest = torch.optim.AdamW(
            [{"params": list(self.others.values())}], lr=recipe.rate_rest, betas=BETAS, weight_decay=DECAY_REST
        )
        by_row = not isinstance(self.task, NextToken)
        self.batches: Callable[[int], Tensor] = (
            RowBatches(train, recipe.batch, recipe.seed) if by_row else Batches(train, recipe.length, recipe.batch, recipe.seed)
        )
        numbers = sum(p.numel() for p in trained.values())
        self.exchange = None if recipe.exchange is None else Exchange(recipe.exchange, numbers)
        self.step, self.curve = 0, Curve()

    def run(self, save: Callable[[dict[str, Tensor]], None], update: Callable[[int, int], None]) -> None:
        """All steps that are left. save: is given the state every so many steps; update: hears of every step."""
        recorder = Recorder(self.model)
        self.model.train()
        try:
            with training_experts(self.model):
                while self.step < self.recipe.last:
                    self.curve.train.append(self._update(recorder))
                    self.step += 1
                    if self.step % self.recipe.judge_every == 0 and self.step < self.recipe.last:
                        self.curve.held.append((self.step, self.judge()))
                    if self.step % self.recipe.keep_every == 0 and self.step < self.recipe.last:
                        save(self.state())
                    update(self.step, self.recipe.last)
                for part in self.parts:
                    part.finish(self.model)
                self.curve.held.append((self.step, self.judge()))
        finally:
            recorder.close()
            self.model.eval()

    def _update(self, recorder: Recorder) -> float:
        """One step. Returns the loss of its task."""
        recipe, place = self.recipe, StepPlace(self.step, self.recipe.steps, self.recipe.seed)
        rows = self.batches(self.step).chunk(recipe.parts)
        if len(rows) == 1 and self.exchange is None:
            loss = self._backward(place, rows[0], recorder)
        else:
            loss = self._exchanged(place, rows, recorder)
        rate = learning_rate(place.share, recipe.decay)
        self.rest.param_groups[0]["lr"] = recipe.rate_rest * rate
        self.muon.step(recipe.rate_matrix * rate, WEIGHT_DECAY)
        self.rest.step()
        self.model.zero_grad(set_to_none=True)
        return loss

    def _exchanged(self, place: StepPlace, rows: Sequence[Tensor], recorder: Recorder) -> float:
        """Gradients of all parts of a batch, each run alone by the process that has it, added up in the order of the parts."""
        vectors = []
        for number in self.processes.own(len(rows)):
            found = torch.tensor([self._backward(place._replace(part=number), rows[number], recorder)])
            gradient = self._gradients()
            sent = gradient if self.exchange is None else self.exchange.message(number, gradient).flatten()
            vectors.append(torch.cat([sent, found]))
            self.model.zero_grad(set_to_none=True)
        if self.exchange is None:
            mean = self.processes.added(vectors) / len(rows)
            self._put(mean[:-1])
            return float(mean[-1])
        every = self.processes.every(vectors)
        self._put(self.exchange.step([vector[:-1].view(2, -1) for vector in every]))
        return float(torch.stack([vector[-1] for vector in every]).mean())

    def _backward(self, place: StepPlace, batch: Tensor, recorder: Recorder) -> float:
        """Gradients of one part of a batch [B, n]. Returns the loss of its task; PrismError where it is not finite."""
        for part in self.parts:
            part.begin(self.model, place)
        with recorder.recording() as routings:
            found = self.task.predict(self._run, batch, place)
        loss = found.loss
        seen = StepSeen(place, found.ids, found.logits, routings, again=found.again)
        terms = [term for term in (part.loss(seen) for part in self.parts) if term is not None]
        total = loss + torch.stack(terms).sum() if terms else loss
        torch.autograd.backward(total)
        if not math.isfinite(total.item()):
            raise PrismError(
                f"the loss of step {self.step} is not finite", "lower rate_matrix and rate_rest, and start again with --force"
            )
        return loss.item()

    def _gradients(self) -> Tensor:
        """Of all trained parameters, as one vector; nothing where a parameter had no part."""
        every = (*self.matrices.values(), *self.others.values())
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in every])

    def _put(self, vector: Tensor) -> None:
        start = 0
        for p in (*self.matrices.values(), *self.others.values()):
            p.grad = vector[start : start + p.numel()].view_as(p).clone() if p.requires_grad else None
            start += p.numel()

    def _run(self, **given: Any) -> Any:
        """What the model says."""
        where = next(self.model.parameters()).device.type
        with torch.autocast(where, torch.bfloat16, enabled=self.recipe.autocast):
            return self.model(**given)

    @torch.no_grad()
    def judge(self) -> float:
        """The loss on held-out examples, as the model routes at this step."""
        self.model.eval()
        found = self.task.judge(self._run, self.held)
        self.model.train()
        return found

    def state(self) -> dict[str, Tensor]:
        """All that a run goes on from."""
        found = {f"value.{n}": p.detach().clone() for n, p in self.model.named_parameters()}
        found |= {f"muon.{n}": buffer.clone() for n, buffer in self.muon.buffers.items()}
        for name, parameter in self.others.items():
            own = self.rest.state.get(parameter, {})
            found |= {f"{moment}.{name}": own[moment].clone() for moment in MOMENTS if moment in own}
        if self.exchange is not None:
            found |= self.exchange.state(self.recipe.parts, self.processes)
        return found | self.curve.tensors() | {"step": torch.tensor(self.step)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. CorruptError where it is of another model."""
        own = {f"value.{n}": p for n, p in self.model.named_parameters()}
        own |= {f"muon.{n}": buffer for n, buffer in self.muon.buffers.items()}
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                raise CorruptError(f"the kept state of the training has no '{name}'", "use --force to start again")
            tensor.copy_(state[name])
        for name, parameter in self.others.items():
            moments = {moment: state[f"{moment}.{name}"].clone() for moment in MOMENTS if f"{moment}.{name}" in state}
            if moments:
                self.rest.state[parameter] = moments
        if self.exchange is not None:
            self.exchange.restore(state, self.recipe.parts, self.processes)
        self.step, self.curve = int(state["step"]), Curve.of(state)
