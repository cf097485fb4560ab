"""What a client calls its request, and the trace that it is a part of: into the log, and the name back into the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def passed_on(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """request_id and traceparent, where they are there once and look like one; anything else is no name, and is left out."""
    wanted = {b"x-request-id": ("request_id", REQUEST_ID), b"traceparent": ("traceparent", TRACE)}
    found: dict[str, list[bytes]] = {}
    for name, value in headers:
        if name in wanted:
            found.setdefault(wanted[name][0], []).append(value)
    forms = dict(wanted.values())
    return {
        name: values[0].decode("ascii") for name, values in found.items() if len(values) == 1 and forms[name].fullmatch(values[0])
    }
