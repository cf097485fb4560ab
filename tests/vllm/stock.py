"""Run with VLLM_PLUGINS=none: write vLLM's own tokens for every prompt as JSON. Arguments: model folder, file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.vllm.prompts import PROMPTS, engine, tokens

if __name__ == "__main__":
    found = tokens(engine(sys.argv[1]), PROMPTS, [None] * len(PROMPTS))
    Path(sys.argv[2]).write_text(json.dumps(found))
