"""Which operating points vLLM can run. Known to the scheduler's process too, which has no model to ask."""

from __future__ import annotations

from ...errors import UsageError
from ...point import OperatingPoint
from ...routing import stage_class


def refusal(point: OperatingPoint) -> str | None:
    """Why a point cannot be run by vLLM's workers; None if it can."""
    if not point.is_per_token:
        return "it changes the weights or the decoding, not single tokens"
    if point.slots.bits is not None:
        return "vLLM's experts have one width"
    if point.slots.scorer == "oracle":
        return "the scorer 'oracle' computes every sub-expert"
    for stage in point.routing:
        try:
            found = stage_class(stage.stage)
        except UsageError as error:
            return error.cause
        if "neurons" in found.needs:
            return f"the routing stage '{stage.stage}' leaves out single neurons, which vLLM's kernels multiply together"
        if "factors" in found.needs:
            return f"the routing stage '{stage.stage}' multiplies inside experts, which vLLM's kernels do not"
        if "attention" in found.needs:
            return f"stage '{stage.stage}' looks at the attention before, which vLLM does not hand on"
        if "past" in found.needs:
            return f"the routing stage '{stage.stage}' looks at the tokens before, which vLLM's layers are not told"
        if "residual" in found.needs:
            return f"the routing stage '{stage.stage}' asks for the residual stream, which vLLM fuses away"
        if stage.keep_mass is None:
            return "it leaves open what happens to the routing weights"
    return None
