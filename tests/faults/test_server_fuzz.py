"""S02: requests made from the server's own schema. `FUZZ_CASES` sets how many are answered at least; 2,000 take two and a half minutes."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("schemathesis")

import httpx2
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.serve.house import open_house

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
KEPT = httpx2.Limits(
    keepalive_expiry=1
)  # well before the server closes a connection that nobody uses: a request may meet its end


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_s02_no_request_of_the_schema_breaks_the_server(tiny_levels):
    with (
        open_house(tiny_levels, {"bounds": {"request_seconds": 20, "header_seconds": 60}}) as house,
        httpx2.Client(base_url=house.root, timeout=60, limits=KEPT) as web,
    ):
        schema = schemathesis.openapi.from_dict(web.get("/openapi.json").json())
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 6
        heavy = [o for o in operations if o.method.upper() == "POST"]
        seen: dict[int, int] = {}
        for operation in operations:
            count = CASES * 21 // 20 // len(heavy) if operation in heavy else 20  # some cases no client can send

            @settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
            def attack(case):
                kwargs = case.as_transport_kwargs(base_url=house.root)
                allowed = {k: kwargs[k] for k in ("method", "url", "params", "headers", "json", "data", "content") if k in kwargs}
                if isinstance(allowed.get("data"), bytes):
                    allowed["content"] = allowed.pop("data")
                try:
                    answer = web.request(**allowed)
                except (httpx2.InvalidURL, UnicodeEncodeError, TypeError, ValueError):
                    return  # the client could not even send it
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text

            attack()
        print(f"answers by status: {dict(sorted(seen.items()))}")
        assert sum(seen.values()) >= CASES and house.idle() == []
        assert web.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


LINKS = (
    ("/v1/models", "get", "/v1/models/{name}", "get", {"parameters": {"path.name": "$response.body#/data/0/id"}}),
    ("/tokenize", "post", "/detokenize", "post", {"requestBody": {"tokens": "$response.body#/tokens"}}),
    ("/tokenize", "post", "/v1/completions", "post", {"requestBody": {"prompt": "$response.body#/tokens", "max_tokens": 2}}),
    ("/v1/models", "get", "/v1/completions", "post", {"requestBody": {"model": "$response.body#/data/0/id", "prompt": "a"}}),
)
"""What one answer is good for in the next request."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_s02_answers_that_are_sent_on_break_nothing(tiny_levels):
    """Sequences of requests: a model by the name that was listed, tokens back to text, tokens as a prompt."""
    with open_house(tiny_levels, {"bounds": {"request_seconds": 20}}) as house:
        document = httpx2.get(house.root + "/openapi.json", timeout=60).json()
        for path, method, target, verb, how in LINKS:
            told = document["paths"][target][verb]
            told.setdefault("operationId", f"{verb} {target}")
            answers = document["paths"][path][method]["responses"]["200"]
            answers.setdefault("links", {})[f"{target} {verb}"] = {"operationId": told["operationId"], **how}
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=house.root)
        statuses: dict[int, int] = {}

        class Workflow(schema.as_state_machine()):  # type: ignore[misc]
            def validate_response(self, response, case, **_):
                statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                assert response.status_code < 500 or response.status_code in (503, 504), response.text

        quiet = settings(max_examples=max(10, CASES // 40), stateful_step_count=8, deadline=None, database=None, derandomize=True)
        run_state_machine_as_test(Workflow, settings=settings(quiet, suppress_health_check=list(HealthCheck)))
        print(f"answers in sequences, by status: {dict(sorted(statuses.items()))}")
        assert statuses[200] > 10 and house.idle() == []
