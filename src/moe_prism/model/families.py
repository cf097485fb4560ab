"""Which MoE families the installed transformers has."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import UsageError

WITHOUT_INTERFACE = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers")
"""Families whose experts are found in a form of their own (`find.FORMS`)."""


def installed_families() -> list[str]:
    """Model types whose modelling file uses the experts interface, found by reading the files, and the ones of `WITHOUT_INTERFACE`."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("transformers is not installed", "pip install moe-prism again")
    models = Path(spec.submodule_search_locations[0]) / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    names = {file.stem.removeprefix("modeling_"): file for file in files}
    return [n for n, file in names.items() if n in WITHOUT_INTERFACE or "@use_experts_implementation" in file.read_text("utf-8")]
