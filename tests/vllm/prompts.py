"""What the engine tests ask, shared with the process that runs stock vLLM."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from moe_prism.point import FULL

# budgets that are held for the request, and one of an earlier version, which is held for nobody
LEVELS = [
    {"name": "quarter", "point": FULL.with_budget(0.25).to_json(), "slots": 4.0, "quality": 0.7},
    {"name": "half", "point": FULL.with_budget(0.5).to_json(), "slots": 8.0, "quality": 0.85},
    {"name": "most", "budget": 0.75, "slots": 12.0, "quality": 0.95},
]
SHORT = [
    "def read_file(path):\n    ",
    "import os\nimport sys\n\nclass Foo(",
    "for i in range(",
    "    def __init__(self, ",
    "import numpy as np\n",
    "try:\n    x =",
    "if __name__",
    "return self.",
]
LONG = inspect.getsource(argparse.ArgumentParser)[:1800]
"""More than two blocks of the prefix cache."""
PROMPTS = [*SHORT, LONG]
NEW_TOKENS = 24
SEATS = 8
"""Requests that run at once."""


def engine(folder: str, **options: Any) -> Any:
    from vllm import LLM

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": SEATS, **options}
    return LLM(folder, **settings)


def generate(llm: Any, prompts: list[str], fields: list[dict[str, Any] | None]) -> list[Any]:
    """vLLM's outputs; fields: the extra arguments of each request."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, extra_args=extra) for extra in fields]
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(llm: Any, prompts: list[str], fields: list[dict[str, Any] | None]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in generate(llm, prompts, fields)]
