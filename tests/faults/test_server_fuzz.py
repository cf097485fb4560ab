"""S02: requests made from the server's own schema. `FUZZ_CASES` sets how many are answered at least; 2,000 take two and a half minutes."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("schemathesis")

import httpx2
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serve.house import open_house

CASES = int(os.environ.get("FUZZ_CASES", "2000"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_s02_no_request_of_the_schema_breaks_the_server(tiny_levels):
    with (
        open_house(tiny_levels, {"bounds": {"request_seconds": 20}}) as house,
        httpx2.Client(base_url=house.root, timeout=60) as web,
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
