"""Every name of vLLM that we use. These are not a public API: see docs/how-to/vllm.md for the versions that were tested."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ...errors import UsageError

LOWEST, BELOW = (0, 31), (0, 34)

_PLACES = {
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "CPUWorker": "vllm.v1.worker.cpu_worker",
    "GPUModelRunner": "vllm.v1.worker.gpu_model_runner",
    "LLM": "vllm",
    "LogitsProcessor": "vllm.v1.sample.logits_processor",
    "MODELS_CONFIG_MAP": "vllm.model_executor.models.config",
    "MoERunner": "vllm.model_executor.layers.fused_moe",
    "Request": "vllm.v1.request",
    "RoutedExperts": "vllm.model_executor.layers.fused_moe",
    "SamplingParams": "vllm",
    "VerifyAndUpdateConfig": "vllm.model_executor.models.config",
    "cpu_prepack_moe_weight": "vllm._custom_ops",
    "current_platform": "vllm.platforms",
    "get_tp_group": "vllm.distributed",
}

# what we override or call, beyond that the names exist
_MEMBERS = {
    "AsyncScheduler": ("add_request", "schedule"),
    "CPUWorker": ("init_device", "load_model", "execute_model"),
    "GPUModelRunner": ("_model_forward",),
    "LLM": ("collective_rpc", "generate"),
    "LogitsProcessor": ("validate_params",),
    "MoERunner": ("_select_forward",),
    "Request": ("update_block_hashes",),
    "RoutedExperts": ("forward_modular",),
}


@cache
def name(what: str) -> Any:
    """A class or function of vLLM. UsageError if this version keeps it elsewhere or lacks what we need of it."""
    try:
        found = getattr(import_module(_PLACES[what]), what)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"this vLLM has no {_PLACES[what]}.{what}", _advice()) from error
    missing = [member for member in _MEMBERS.get(what, ()) if not hasattr(found, member)]
    if missing:
        raise UsageError(f"{what} of this vLLM has no {missing[0]}", _advice())
    return found


def problem() -> str | None:
    """Why the installed vLLM cannot be used; None if it can."""
    if find_spec("vllm") is None:
        return f"vLLM is not installed; {_advice()}"
    return version_problem(import_module("vllm").__version__)


def knows_constant_experts() -> bool:
    """Whether this vLLM reads `approximate_experts`; older ones load such a folder and leave the places of experts as they are."""
    return find_spec("vllm.model_executor.layers.fused_moe.expert_substitution") is not None


def version_problem(version: str) -> str | None:
    """Why a version, "0.32.0" or "0.32.0+cpu", is outside the window."""
    parts = version.split(".")
    known = len(parts) >= 2 and parts[0].isdecimal() and parts[1].isdecimal()
    if known and LOWEST <= (int(parts[0]), int(parts[1])) < BELOW:
        return None
    return f"moe-prism does not know vLLM {version}; {_advice()}"


def _advice() -> str:
    return f"use vLLM >= {LOWEST[0]}.{LOWEST[1]} and < {BELOW[0]}.{BELOW[1]}"


def share() -> Any:
    """Which worker this process is of those that share every expert's neurons, a `stripe.Share`."""
    from .stripe import Share  # numba: see worker.py

    group = name("get_tp_group")()
    return Share(group.rank_in_group, group.world_size, partial(_gather, group))


def _gather(group: Any, own: Any) -> list[Any]:
    """A CPU tensor of every worker of a group, by rank. All of them must call it."""
    import torch

    raw = own.contiguous().view(torch.uint8)
    found = [torch.empty_like(raw) for _ in range(group.world_size)]
    torch.distributed.all_gather(found, raw, group=group.cpu_group)
    return [each.view(own.dtype) for each in found]


def opaque_forward(runner: Any) -> Any:
    """The MoE forward as one operator. torch.compile traces through the plain one on a CPU and would freeze the budgets it met first."""
    import torch

    ops = torch.ops.vllm
    return ops.moe_forward if runner.shared_experts is None else ops.moe_forward_shared


def kernel_order(experts: Any) -> str | None:
    """The weight order of the kernel that a RoutedExperts has chosen ("vec", "amx", ...); None if it is not one of the CPU's own."""
    kernel = getattr(experts.quant_method, "moe_kernel", None)
    chosen = getattr(kernel, "fused_experts", None)
    return None if chosen is None or getattr(chosen, "_use_zentorch", False) else getattr(chosen, "isa", None)
