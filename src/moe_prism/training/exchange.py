"""EControl (arXiv 2311.05645): parts of a batch send a few entries of their gradients, and what they leave out is fed back with control.

For part i with gradient g: d = C(eta e + g - h); h += d; e += g - h. The step is made with the mean of all h. C keeps the largest entries.
The feedback eta controls how fast the error e comes back: with all of it, at once, it would itself be compressed away. `plain` keeps C(g)
and has no memory. The parts of a batch are the workers, whoever computes them: so several processes give what one gives.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CorruptError
from ..schema.training import ExchangeForm
from .processes import Processes


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(places [count] ascending, values there) of the entries of values [n] of the largest size."""
    places = values.abs().topk(count).indices.sort().values
    return places, values[places]


class Exchange:
    """The gradients of one training, n numbers."""

    def __init__(self, form: ExchangeForm, numbers: int) -> None:
        self.form, self.numbers = form, numbers
        self.count = max(1, round(form.share * numbers))
        self.mean = torch.zeros(numbers)
        self.held: dict[int, Tensor] = {}
        self.errors: dict[int, Tensor] = {}
        self.sent = 0
        """Bytes of a step, by all parts: four for a place, four for a value."""

    def message(self, part: int, gradient: Tensor) -> Tensor:
        """[2, count]: places and values that a part sends, both in the bits of float32 numbers."""
        if self.form.kind == "plain":
            places, values = largest(gradient, self.count)
        else:
            held = self.held.setdefault(part, torch.zeros_like(gradient))
            error = self.errors.setdefault(part, torch.zeros_like(gradient))
            places, values = largest(self.form.feedback * error + gradient - held, self.count)
            held.index_add_(0, places, values)
            error += gradient - held
        return torch.stack([places.to(torch.int32).view(torch.float32), values])

    def step(self, messages: list[Tensor]) -> Tensor:
        """The gradient [n] of the whole batch, from what all parts have sent, in their order."""
        if self.form.kind == "plain":
            self.mean.zero_()
        for message in messages:
            self.mean.index_add_(0, message[0].contiguous().view(torch.int32).long(), message[1] / len(messages))
        self.sent = len(messages) * self.count * 8
        return self.mean

    def state(self, parts: int, processes: Processes) -> dict[str, Tensor]:
        """What a run goes on from, of all parts. Every process has to ask at the same step."""
        found = {"exchange.mean": self.mean.clone()}
        for name, own in (("held", self.held), ("error", self.errors)):
            if self.form.kind == "econtrol" and own:
                every = processes.every([own[part] for part in processes.own(parts)])
                found |= {f"exchange.{name}.{part}": tensor for part, tensor in enumerate(every)}
        return found

    def restore(self, state: Mapping[str, Tensor], parts: int, processes: Processes) -> None:
        """CorruptError for a state without it."""
        try:
            self.mean = state["exchange.mean"].clone()
            if self.form.kind == "econtrol":
                self.held = {part: state[f"exchange.held.{part}"].clone() for part in processes.own(parts)}
                self.errors = {part: state[f"exchange.error.{part}"].clone() for part in processes.own(parts)}
        except KeyError as error:
            raise CorruptError(f"the kept state of the training has no {error}", "use --force to start again") from error
