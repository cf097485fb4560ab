"""Parts of a training that begins from another model, or follows one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..architectures.base import WEIGHTS, StepSeen, TrainingPart, routers
from ..architectures.parts import experts_of


class Teacher(TrainingPart):
    """Adds weight x KL from the teacher's next token to the model's, in nats per token."""

    def __init__(self, teacher: Any, weight: float) -> None:
        self.teacher, self.weight = teacher.eval().requires_grad_(False), weight

    def loss(self, seen: StepSeen) -> Tensor | None:
        if not self.weight:
            return None
        with torch.no_grad():
            theirs = self.teacher(input_ids=seen.ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
        own = seen.logits.flatten(0, 1).float().log_softmax(-1)
        return self.weight * nn.functional.kl_div(own, theirs, reduction="batchmean", log_target=True)


class Alone(TrainingPart):
    """Only experts, or only routers, are trained."""

    def __init__(self, which: Literal["experts", "routers"]) -> None:
        self.which = which

    def start(self, model: nn.Module) -> None:
        kept = experts_of(model) if self.which == "experts" else routers(model)
        model.requires_grad_(False)
        for module in kept:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


class AlikeExperts(TrainingPart):
    """Experts that begin with the same weights are one expert, and stay one: those that a method of merging has left."""

    def start(self, model: nn.Module) -> None:
        for module in experts_of(model):
            same = first_alike(module)
            if len(torch.unique(same)) < len(same):
                module.__dict__[WEIGHTS] = lambda weight, same=same: weight[same]

    def finish(self, model: nn.Module) -> None:
        with torch.no_grad():
            for module in experts_of(model):
                through = module.__dict__.pop(WEIGHTS, None)
                for parameter in module.parameters(recurse=False) if through else ():
                    parameter.copy_(through(parameter))


def first_alike(module: nn.Module) -> Tensor:
    """[E]: for every expert the first one with the same matrices."""
    stacks = [p.detach().flatten(1) for p in module.parameters(recurse=False) if p.ndim == 3]
    same = torch.arange(len(stacks[0]))
    for e in range(len(same)):
        for earlier in torch.unique(same[:e]).tolist():
            if all(torch.equal(stack[e], stack[earlier]) for stack in stacks):
                same[e] = earlier
                break
    return same
