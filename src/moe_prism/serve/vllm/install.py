"""Give the MoE layers of a loaded vLLM model a way to run at other operating points."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...artefact.load import check_complete, side_tensors, whole_manifest
from ...elastic.bind import Bound, Step, bind
from ...elastic.control import Past
from ...errors import CorruptError
from ...kernels.packed_tiles import WIDTH
from ...schedule.base import Ladder
from . import compat
from .layer import PackedElastic, PackedWeights, pack, unknown_side
from .levels import Menu, full_slots
from .state import STEP
from .stripe import Share
from .whole import full_only, own_options

logger = logging.getLogger(__name__)


class ElasticExperts(compat.name("RoutedExperts")):  # type: ignore[misc]
    """vLLM's experts, with `elastic` beside them. Rows at the full model are always the stock kernel's, whoever else is in the step."""

    elastic: PackedElastic
    number: int
    bound: Bound

    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **named: Any) -> Any:
        """x [T, d], topk_weights and topk_ids [T, k], as the stock router chose them; -> [T, d]."""
        level = STEP.level
        if level is None:
            return super().forward_modular(x, topk_weights, topk_ids, *shared, **named)
        if len(level) < len(x):  # rows that only fill a shape up
            level = torch.cat([level, level.new_full((len(x) - len(level),), int(level.min()))])
        less = level < len(self.bound.points) - 1
        if bool(less.all()):
            return self._split(x, topk_ids, topk_weights, Step(self.bound, level, past=_past(len(x))))
        full, split = less.logical_not().nonzero()[:, 0], less.nonzero()[:, 0]
        out = torch.empty_like(x)
        out[full] = super().forward_modular(x[full], topk_weights[full], topk_ids[full], *shared, **named)
        past = _past(len(x))
        step = Step(self.bound, level[split], past=past and past.part(split.numpy()))
        out[split] = self._split(x[split], topk_ids[split], topk_weights[split], step)
        return out

    def _split(self, x: Tensor, index: Tensor, weight: Tensor, step: Step) -> Tensor:
        self.elastic.step = step
        return self.elastic.run(self.number, x, index, weight)


def _past(rows: int) -> Past | None:
    """Of all rows of the batch, those that only fill a shape up included."""
    past = STEP.past
    return past if past is None or past.rows.shape[1] == rows else past.part(np.arange(rows))


def install(model: Any, config: Any) -> tuple[Ladder, Bound | None]:
    """Make a loaded model elastic, its expert weights being in the order of vLLM's CPU kernel; returns the levels it will be asked for,
    and how they run.

    Experts that cannot be split are left as they are, and requests for less than full quality are then refused. Raises PrismError if
    prism.json or prism.safetensors do not belong to the model, and where the operator asked for less.
    """
    folder = Path(config.model_config.model)
    manifest = whole_manifest(folder)
    menu = Menu.of(folder, own_options(config))
    runners = [(name, module) for name, module in model.named_modules() if isinstance(module, compat.name("MoERunner"))]
    if len(runners) != len(manifest["layers"]):
        raise CorruptError(
            f"prism.json knows {len(manifest['layers'])} MoE layers, vLLM found {len(runners)}", "refactor the model again"
        )
    sides = side_tensors(folder, len(runners))
    check_complete(folder, sides)
    width, n_sub, gates = manifest["layers"][0]["width"], manifest["n_sub"], manifest["gates"]
    share = compat.share()
    problem = (
        _problem(runners[0][1].routed_experts, width, share.size) or unknown_side(sides[0]) or share.problem(width, n_sub, gates)
    )
    if problem:
        full_only(problem, menu, own_options(config))
        return menu.ladder, None
    weights = [(name, _weights(runner.routed_experts, share, n_sub)) for name, runner in runners]
    elastic = PackedElastic(model, weights, sides, n_sub=n_sub, gates=gates, k=full_slots(folder) // n_sub)
    bound = bind(elastic, [level.point for level in menu.ladder.levels])
    for number, (_, runner) in enumerate(runners):
        experts = runner.routed_experts
        experts.elastic, experts.number, experts.bound = elastic, number, bound
        experts.__class__ = ElasticExperts
        if config.compilation_config.mode:
            runner._forward_entry = compat.opaque_forward(runner)
    logger.info("moe-prism: %d MoE layers, %d sub-experts per expert, %d levels", len(runners), n_sub, len(menu.ladder))
    return menu.ladder, bound


def _weights(experts: Any, share: Share, n_sub: int) -> PackedWeights:
    """The weights of a layer; with several workers, after they have exchanged their stripes."""
    w13, w2 = experts.w13_weight.data, experts.w2_weight.data
    if share.size > 1:
        share.stripe(w13, w2, n_sub)
    return PackedWeights(w13=w13, w2=w2, activation=experts.activation.value, share=share)


def _problem(experts: Any, width: int, workers: int) -> str | None:
    """Why the kernel that vLLM chose for these experts of f neurons cannot be split; None if it can."""
    order = compat.kernel_order(experts)
    if order is None or type(experts) is not compat.name("RoutedExperts") or experts.quant_method.is_monolithic:
        return f"vLLM chose experts ({type(experts).__name__}) that moe-prism does not know"
    if experts.apply_router_weight_on_input or hasattr(experts, "w13_bias"):
        return "experts with biases, or with weights on the input, run at full budget only"
    if experts.w2_weight.shape[2] * workers != width:
        return f"vLLM fills {width} neurons up to {experts.w2_weight.shape[2] * workers}"
    dtype = experts.w13_weight.dtype
    probe = torch.arange(2 * WIDTH * 2 * WIDTH, dtype=torch.float32).view(1, 2 * WIDTH, 2 * WIDTH).remainder(251).to(dtype)
    packed = compat.name("cpu_prepack_moe_weight")(probe, order)
    if dtype not in (torch.float32, torch.bfloat16) or not torch.equal(packed.flatten(), pack(probe).flatten()):
        return f"vLLM's kernel '{order}' for {dtype} keeps weights in an order that moe-prism does not know"
    return None
