"""The cache of attention under the name that transformers gives it: `cache` from 5.24 on, `past_key_values` before.

The old name still works there, with a warning, until it does not. A hook sees whichever name the caller wrote.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

OLD, NEW = "past_key_values", "cache"


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of a model's forward or `generate`."""
    return {NEW if NEW in inspect.signature(type(model).forward).parameters else OLD: cache}


def given_cache(named: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward; None without one that continues the same rows.

    transformers' paged cache comes under the new name too. It holds other requests at every step, and has no length.
    """
    found = named.get(NEW)
    found = named.get(OLD) if found is None else found
    return found if hasattr(found, "get_seq_length") else None


def made_cache(output: Any) -> Any:
    """The cache in what a forward returned; None where it returned none."""
    return given_cache(output) if isinstance(output, Mapping) else None
