"""Choose our scheduler, worker and field check when the model being served is elastic."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ...checkpoint.constant import CONFIG_KEY
from ...errors import UsageError
from . import compat
from .levels import SECTION, Menu, is_elastic
from .whole import FOLDER, POINTS, full_only, own_options, prepare

logger = logging.getLogger(__name__)

SCHEDULER, WORKER, UNCHECKED, CHECK = (
    f"{__package__}.scheduler.PrismScheduler",
    f"{__package__}.worker.PrismWorker",
    f"{__package__}.unchecked.UncheckedWorker",
    f"{__package__}.check:FieldCheck",
)
ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
)


def wire() -> None:
    """Have vLLM call `configure` for the architectures that we support, after its own settings for them."""
    table = compat.name("MODELS_CONFIG_MAP")
    for architecture in ARCHITECTURES:
        own = table.get(architecture)
        if not hasattr(own, "moe_prism"):
            table[architecture] = _hook(own)


def _hook(own: Any) -> Any:
    class Hook(compat.name("VerifyAndUpdateConfig")):  # type: ignore[misc]
        moe_prism = True

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            if own is not None:
                own.verify_and_update_config(vllm_config)
            configure(vllm_config)

    return Hook


def configure(config: Any) -> None:
    """Fill in what makes an elastic folder elastic; leave everything else alone.

    Raises UsageError for a bad option under `moe_prism` of --additional-config, and for constant experts where vLLM would ignore them.
    """
    folder = Path(config.model_config.model)
    if getattr(getattr(config.model_config, "hf_text_config", None), CONFIG_KEY, None) and not compat.knows_constant_experts():
        raise UsageError(
            f"'{folder}' has constant experts, which this vLLM does not know: it would answer from weights that are not there",
            "use vLLM 0.33 or newer",
        )
    if not is_elastic(folder):
        return
    options = own_options(config)
    menu = Menu.of(folder, options)
    problem = unsupported(config)
    prepare()
    os.environ[FOLDER], os.environ[POINTS] = str(folder), json.dumps(options.get("points", []))
    if problem:
        full_only(problem, menu, options)
    if config.speculative_config is not None:
        _check_beside_drafts(config)
    if CHECK not in (config.model_config.logits_processors or []):
        config.model_config.logits_processors = [*(config.model_config.logits_processors or []), CHECK]
    if problem:
        return
    if len(menu.ladder) == 1:
        logger.warning("moe-prism: %s has no measured levels; run `moe-prism frontier %s --compare threshold`", folder, folder)
    config.scheduler_config.scheduler_cls = SCHEDULER
    config.parallel_config.worker_cls = WORKER
    # part of the key of vLLM's compile cache: a graph that was traced for the stock model must not be used
    config.additional_config = {**config.additional_config, SECTION: {**options, "wired": 1}}


def _check_beside_drafts(config: Any) -> None:
    """vLLM refuses processors of logits beside speculative decoding, ours too, which only looks at requests: the worker takes it out."""
    if not compat.name("current_platform").is_cpu() or config.parallel_config.worker_cls not in ("auto", UNCHECKED):
        raise UsageError(
            "with speculative decoding nobody could refuse a request for less than full quality here",
            "leave it out, or start with VLLM_PLUGINS=none, which serves the full model",
        )
    config.parallel_config.worker_cls = UNCHECKED


def unsupported(config: Any) -> str | None:
    """What keeps us from splitting experts under this configuration; None if nothing does."""
    parallel, worker = config.parallel_config, config.parallel_config.worker_cls
    if not compat.name("current_platform").is_cpu():
        return "budgets below 1 run on vLLM's CPU backend only"
    for size, kind in ((parallel.pipeline_parallel_size, "pipeline"), (parallel.data_parallel_size, "data")):
        if size > 1:
            return f"budgets below 1 do not run under {kind} parallelism"
    if parallel.enable_expert_parallel:
        return "budgets below 1 do not run under expert parallelism"
    if config.model_config.quantization:
        return f"the experts are quantized ({config.model_config.quantization})"
    if config.speculative_config is not None:
        return "budgets below 1 do not go together with speculative decoding"
    if config.scheduler_config.scheduler_cls not in (None, SCHEDULER) or worker not in ("auto", WORKER):
        return "a scheduler or worker class of your own is set"
    return None
