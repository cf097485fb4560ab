"""From the options of experts on disk to a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..options.experts import AUTO, ExpertOptions

if TYPE_CHECKING:
    from ..store import StoreOptions


def store_options(experts: ExpertOptions) -> StoreOptions | None:
    """What a store is opened with; None for a model in memory. UsageError for an option that would do nothing."""
    experts.check()
    experts.check_used()
    if experts.expert_memory is None:
        return None
    from ..store import StoreOptions, parse_bytes
    from ..store.choose_misses import Misses

    return StoreOptions(
        None if experts.expert_memory == AUTO else parse_bytes(experts.expert_memory, instead=AUTO),
        experts.expert_file,
        experts.expert_policy,
        parts=experts.expert_parts,
        misses=Misses(experts.miss_floor, experts.int8_budget),
        ahead=experts.expert_ahead,
        tries_ahead=not experts.expert_ahead_always,
        predictor=experts.expert_predictor,
        fitted=experts.expert_settings,
    )
