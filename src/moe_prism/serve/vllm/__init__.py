"""vLLM plug-in: `vllm serve OUT` runs every request at its own operating point. No fork, nothing to convert, no flag needed.

vLLM loads OUT as the ordinary model it is. `register` is called by vLLM in each of its processes (entry point group
vllm.general_plugins); for a folder with prism.json, `wiring` then chooses our scheduler (a level per request), worker (budgets per row)
and check of request fields. Nothing else of vLLM is replaced. docs/how-to/vllm.md says what is supported.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Entry point. Cheap, and harmless when repeated, for models that are not ours, and on a vLLM that we do not know."""
    from . import compat, wiring

    problem = compat.problem()
    if problem:
        logging.getLogger(__name__).warning("%s; elastic models are served at full budget", problem)
    else:
        wiring.wire()
