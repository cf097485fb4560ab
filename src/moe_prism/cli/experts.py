"""From the options of experts on disk to a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..memory import parse_bytes
from ..options.experts import AUTO, ExpertOptions

if TYPE_CHECKING:
    from ..store import StoreOptions


def store_options(experts: ExpertOptions) -> StoreOptions | None:
    """What a store is opened with; None for a model in memory. UsageError for an option that would do nothing."""
    experts.check()
    experts.check_used()
    if experts.expert_memory is None:
        return None
    if experts.expert_settings is not None:
        from ..offload.settings import read_settings

        read_settings(experts.expert_settings)  # wrong ones are told before the store is imported, which takes seconds
    memory = None if experts.expert_memory == AUTO else parse_bytes(experts.expert_memory, instead=AUTO)
    from ..store import StoreOptions
    from ..store.choose_misses import Misses

    return StoreOptions(
        memory,
        experts.expert_file,
        experts.expert_policy,
        parts=experts.expert_parts,
        misses=Misses(
            experts.miss_floor, experts.int8_budget, shares=_shares(experts.miss_shares), prompt_rate=experts.prompt_rate
        ),
        ahead=experts.expert_ahead,
        tries_ahead=not experts.expert_ahead_always,
        predictor=experts.expert_predictor,
        horizon=experts.expert_horizon,
        fitted=experts.expert_settings,
    )


def _shares(text: str | None) -> tuple[float, float] | None:
    """(T1, T2) of --miss-shares."""
    if text is None:
        return None
    try:
        first, second = map(float, text.split(","))
    except ValueError:
        raise UsageError(f"--miss-shares '{text[:40]}' is not two numbers", "give T1,T2, for example 0.6,0.9") from None
    return first, second
