"""The table of request fields knows vLLM's."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
pytest.importorskip("fastapi")

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from moe_prism.serve.http.fields import VLLM

NEWEST = {"return_weight_versions"}
"""Fields that vLLM has since 0.33."""


@pytest.mark.parametrize(("endpoint", "request_type"), [("completions", CompletionRequest), ("chat", ChatCompletionRequest)])
def test_the_table_has_every_field_of_vllm(endpoint, request_type):
    fields = set(request_type.model_fields)
    assert VLLM[endpoint] - NEWEST <= fields <= VLLM[endpoint]
