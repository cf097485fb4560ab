"""What a command is asked that can run a model whose experts stay on disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import UsageError
from .base import Options, flag_of, option

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ExpertOptions(Options):
    """Experts on disk."""

    expert_memory: str | None = option(
        None,
        "Keep the experts on disk and this much of them in memory, for example 200MB, or auto: what is left beside the rest of the "
        "model, its cache and a reserve; default all of them.",
    )
    expert_file: Path | None = option(
        None, "Where they are packed for that, written on first use; default experts.pack in the folder."
    )
    expert_parts: int | None = option(
        None,
        "Records per expert in that file: 1 for whole experts, which are then computed whole, else the model's sub-experts, the default.",
        least=1,
        most=1024,
    )
    expert_policy: str | None = option(
        None,
        "Who leaves when room is needed, see `moe-prism ls cache-policies`; default lfu, or edge-moe for few slots per layer.",
        names="moe_prism.offload.cache:cache_policies",
    )
    expert_ahead: int | None = option(
        None, "Sub-experts to read ahead of a layer at most; default what --expert-settings says, else none.", least=0
    )
    expert_ahead_always: bool = option(
        False,
        "Read ahead in any case. By default a few steps with it and a few without take turns, and it stops where steps get no shorter.",
    )
    expert_predictor: str | None = option(
        None,
        "What guesses the experts that are read ahead, see `moe-prism ls predictors`; default that of --expert-settings, else gate, the "
        "next layer's router on this layer's input. All others need their fit.",
        names="moe_prism.offload.predict:predictors",
    )
    expert_horizon: int = option(
        1,
        "Layers to look ahead at most. Where all that the next layer is guessed to want is in memory, the one after it is guessed from the "
        "same input, and so on (HOBBIT). With the predictor gate.",
        least=1,
    )
    expert_settings: Path | None = option(
        None, "Policy, quotas, predictor and width as `moe-prism offload fit` wrote them; other options go before it."
    )
    miss_floor: float = option(
        1.0,
        "Share of the slots up to which sub-experts are read that are not in memory, below --budget; those in memory are used up to "
        "--budget.",
    )
    int8_budget: float | None = option(
        None, "Share of the slots up to which missing ones are then read in int8 form instead of being skipped."
    )

    miss_shares: str | None = option(
        None,
        "T1,T2 in place of both (HOBBIT): an expert that is not in memory is read as it is where a token's stronger experts hold at most "
        "the share T1 of its routing weight, in int8 form or its upper plane up to T2, else skipped. 1,1 reads all.",
    )

    prompt_rate: float = option(
        0.0,
        "In steps of more than 8 tokens, as prompts are: what is missing of the least used experts is read in int8 form, or its upper "
        "plane alone, as many of them as have at most this share of all uses together (Fate). 0 reads all as they are.",
        least=0,
        most=1,
    )

    def check_used(self) -> None:
        """UsageError for an option that would do nothing, because all experts are in memory."""
        if self.expert_ahead_always and not self.expert_ahead and self.expert_settings is None:
            raise UsageError("--expert-ahead-always is of no use alone", "give --expert-ahead or --expert-settings as well")
        if self.expert_horizon > 1 and not self.expert_ahead and self.expert_settings is None:
            raise UsageError("--expert-horizon is of no use alone", "give --expert-ahead or --expert-settings as well")
        if self.expert_memory is not None:
            return
        for declared in fields(self):
            if getattr(self, declared.name) != declared.default:
                raise UsageError(f"{flag_of(declared)} is of no use alone", "give --expert-memory as well")
