"""JSON lines. A log line has what a request cost and never what it said.

Not structlog: records of uvicorn and transformers come from `logging` anyway and would need a formatter of ours in there, too.
"""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonLines(logging.Formatter):
    """One object per line: time, level, event, and the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__  # the message of an exception may quote its input
            if record.exc_info[2] is not None:
                last = record.exc_info[2]
                while last.tb_next is not None:
                    last = last.tb_next
                line["where"] = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
        return json.dumps(line, default=str)


def set_up(debug: bool = False) -> None:
    """The server's own logging, on stderr. Only the command calls this: a library leaves the root logger alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter() if debug else JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("uvicorn.access", "httpx", "httpx2", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
