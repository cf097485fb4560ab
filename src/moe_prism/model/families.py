"""Which MoE families the installed transformers has."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import UsageError


def installed_families() -> list[str]:
    """Model types whose modelling file uses the experts interface; found by reading the files, without importing them."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("transformers is not installed", "pip install moe-prism again")
    models = Path(spec.submodule_search_locations[0]) / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    return [f.stem.removeprefix("modeling_") for f in files if "@use_experts_implementation" in f.read_text("utf-8")]
