"""Give the MoE layers of a loaded vLLM model a way to run below full budget."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artefact.load import side_tensors
from ...checkpoint import read_manifest
from ...errors import CorruptError
from ...kernels.packed_tiles import WIDTH
from . import compat
from .layer import PackedLayer, pack, unknown_side
from .state import STEP

logger = logging.getLogger(__name__)


class ElasticExperts(compat.name("RoutedExperts")):  # type: ignore[misc]
    """vLLM's experts, with `elastic` beside them. Rows at full budget are always the stock kernel's, whoever else is in the step."""

    elastic: PackedLayer

    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **named: Any) -> Any:
        """x [T, d], topk_weights and topk_ids [T, k], as the stock router chose them; -> [T, d]."""
        if STEP.budget is None:
            return super().forward_modular(x, topk_weights, topk_ids, *shared, **named)
        budget = STEP.budget
        if len(budget) < len(x):  # rows that only fill a shape up
            budget = torch.cat([budget, budget.new_full((len(x) - len(budget),), float(budget.min()))])
        less = budget < 1
        if bool(less.all()):
            return self.elastic(x, topk_ids, topk_weights, budget)
        full, split = less.logical_not().nonzero()[:, 0], less.nonzero()[:, 0]
        out = torch.empty_like(x)
        out[full] = super().forward_modular(x[full], topk_weights[full], topk_ids[full], *shared, **named)
        out[split] = self.elastic(x[split], topk_ids[split], topk_weights[split], budget[split])
        return out


def install(model: Any, config: Any) -> None:
    """model: loaded, its expert weights in the order of vLLM's CPU kernel.

    A kernel that cannot be split is left as it is, with a warning: quality is then above what is asked. Raises PrismError if
    prism.json or prism.safetensors do not belong to the model.
    """
    folder = Path(config.model_config.model)
    manifest = read_manifest(folder)
    runners = [module for module in model.modules() if isinstance(module, compat.name("MoERunner"))]
    if len(runners) != len(manifest["layers"]):
        raise CorruptError(
            f"prism.json knows {len(manifest['layers'])} MoE layers, vLLM found {len(runners)}", "refactor the model again"
        )
    problem = _problem(runners[0].routed_experts, manifest["layers"][0]["width"])
    if problem:
        logger.warning("moe-prism: %s; every request is served at full budget", problem)
        return
    sides = side_tensors(folder, len(runners))
    unknown = unknown_side(sides[0])
    if unknown:
        logger.warning("moe-prism: %s is not computed in vLLM; every request is served at full budget", unknown)
        return
    for runner, side in zip(runners, sides, strict=True):
        experts = runner.routed_experts
        experts.elastic = PackedLayer(
            experts.w13_weight.data, experts.w2_weight.data, experts.activation.value, manifest["n_sub"], manifest["gates"], side
        )
        experts.__class__ = ElasticExperts
        if config.compilation_config.mode:
            runner._forward_entry = compat.opaque_forward(runner)
    logger.info("moe-prism: %d MoE layers, %d sub-experts per expert", len(runners), manifest["n_sub"])


def _problem(experts: Any, width: int) -> str | None:
    """Why the kernel that vLLM chose for these experts cannot be split; None if it can."""
    order = compat.kernel_order(experts)
    if order is None or type(experts) is not compat.name("RoutedExperts") or experts.quant_method.is_monolithic:
        return f"vLLM chose experts ({type(experts).__name__}) that moe-prism does not know"
    if experts.apply_router_weight_on_input or hasattr(experts, "w13_bias"):
        return "experts with biases, or with weights on the input, run at full budget only"
    if experts.w2_weight.shape[2] != width:
        return f"vLLM fills {width} neurons up to {experts.w2_weight.shape[2]}"
    dtype = experts.w13_weight.dtype
    probe = torch.arange(2 * WIDTH * 2 * WIDTH, dtype=torch.float32).view(1, 2 * WIDTH, 2 * WIDTH).remainder(251).to(dtype)
    packed = compat.name("cpu_prepack_moe_weight")(probe, order)
    if dtype not in (torch.float32, torch.bfloat16) or not torch.equal(packed.flatten(), pack(probe).flatten()):
        return f"vLLM's kernel '{order}' for {dtype} keeps weights in an order that moe-prism does not know"
    return None
