"""What a server is asked for on the command line. Both processes of a server get it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .base import Options, option


@dataclass(frozen=True, kw_only=True)
class ListenOptions(Options):
    """Where a server listens, and who may use it."""

    host: str = option("127.0.0.1", "Address to listen on. Anything but loopback needs a key.")
    port: int = option(8000, "Port to listen on; 0 for any free one.", least=0, most=65_535)
    api_key: str | None = option(
        None,
        "Key that every route but /health asks for; default: the variable MOE_PRISM_API_KEY. Others on the machine can see it here.",
    )
    api_key_file: Path | None = option(None, "File with keys, one per line: one for each tenant.")
    allowed_origins: tuple[str, ...] = option((), "Comma-separated origins of web pages that may ask; * for all. Default: none.")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ListenOptions):
    """Where it listens, what it serves and how. store: experts stay on disk (`store.StoreOptions`); it is no flag.

    >>> import moe_prism
    >>> moe_prism.ServeOptions(port=70000).check()
    Traceback (most recent call last):
    moe_prism.errors.UsageError: --port 70000 is out of range; give at least 0 and at most 65535
    """

    name: str | None = option(None, "Model name in answers; default: the folder's.")
    points: tuple[str, ...] = option(
        (),
        "Comma-separated names of measured operating points to serve, or another frontier.json; "
        "default: the best of all that can share a batch.",
    )
    bytes_per_token: float | None = option(
        None,
        "Bytes of expert weights that a token may read, such as 300kB, where a request says no quality: it gets the measured point that is "
        "closest to the model within them.",
        unit=("B",),
        above=0,
    )
    policy: str | None = option(
        None, "Scheduling policy; see `moe-prism ls policies`. Default elastic.", names="moe_prism.schedule:policies"
    )
    config: Path | None = option(None, "qos.yaml with request classes, limits and policy options.")
    cost: Path | None = option(None, "Cost model to load instead of measuring one.")
    save_cost: Path | None = option(
        None, "Where to save the cost model: when it is measured, and again at the end with what was learned."
    )
    probe_seconds: float = option(4.0, "Seconds to measure the cost model.", above=0, most=600)
    verify: bool = option(
        False, "First compare every file of the folder with its sha256 in prism.json; without, only the small ones."
    )
    patterns: Path | None = option(
        None,
        "File of `moe-prism patterns`: only the experts that a task needs take part, and no others are ever read from a store.",
    )
    task: str | None = option(None, "With --patterns: the task. Default: the one that --task-prompts are nearest to.")
    task_prompts: Path | None = option(None, "With --patterns: text such as it will be asked, which says the task.")
    task_keep: float = option(0.5, "With --patterns: the share of the experts that takes part.", above=0, most=1)
    adapters: list[str] = option(
        [],
        "NAME=FOLDER of a fine-tune of this model that `moe-prism adapter` wrote: requests for MODEL:NAME get it. Repeat it for more.",
        flag="adapter",
        is_repeated=True,
    )
    adapter_folder: Path | None = option(
        None, "Folder of adapters that an administrator may load and unload while the server runs. Default: none may."
    )
    adapter_room: int | None = option(
        None,
        "With --adapter-folder: tuned experts per layer that can be loaded at once. Default: as many as the layer has experts.",
        least=1,
        most=65_536,
    )
    admin_key_file: Path | None = option(None, "File with keys of administrators, one per line. No other key opens /admin.")
    self_draft: str | None = option(
        None,
        "Requests at the full model draft tokens at a low budget and check them together, where that is faster here: BUDGET, or such as "
        "budget=0.25:length=4. No token changes by it.",
    )
    trace_out: Path | None = option(
        None,
        "Record which experts the requests' tokens use, for `moe-prism offload fit`, to this .npz file: it is written when --trace-tokens "
        "are recorded or the server stops. Read docs/how-to/run-what-does-not-fit.md on what it reveals.",
    )
    trace_tokens: int = option(16_384, "With --trace-out: tokens to record, then it stops.", least=1, most=1 << 22)
    trace_ids: bool = option(
        False, "With --trace-out: keep token ids too, from which the text can be read. Predictors that go by tokens need them."
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "Where OpenTelemetry spans of requests go: an OTLP collector over HTTP, such as http://127.0.0.1:4318/v1/traces. Needs "
        "moe-prism[otel]. Default: what the variables OTEL_... say, and without them nowhere.",
    )
    decoding: list[str] = option(
        [],
        "A method of decoding that a request may ask for, with the field `decode`: scmoe, des or concise; rewiring lets it have the router "
        "fitted to its prompt, with the field `rewire`. Repeat it for more. Such requests run beside the batch. Default: none.",
        is_repeated=True,
    )
    verifier: str | None = option(
        None, "With --decoding des: FILE.py:FUNCTION that says how good a text is, (prompt, text) to a number. The file is run."
    )
    debug: bool = option(False, "Plain logs with stack traces.")
    store: Any = None

    def check(self) -> None:
        super().check()
        if self.patterns is None and (self.task or self.task_prompts or self.task_keep != ServeOptions.task_keep):
            raise UsageError("--task, --task-prompts and --task-keep belong to --patterns", "give a file of `moe-prism patterns`")
        if self.patterns is not None and (self.task is None) == (self.task_prompts is None):
            raise UsageError("--patterns wants one of --task and --task-prompts", "name the task, or give a file of prompts")
        if self.trace_out is None and (self.trace_ids or self.trace_tokens != ServeOptions.trace_tokens):
            raise UsageError("--trace-tokens and --trace-ids belong to --trace-out", "give it too, or leave them out")
        self.named_adapters()
        self._check_decoding()
        if self.adapter_room is not None and self.adapter_folder is None:
            raise UsageError("--adapter-room belongs to --adapter-folder", "give both, or leave it out")
        if (self.adapter_folder is None) != (self.admin_key_file is None):
            raise UsageError("--adapter-folder and --admin-key-file go together", "give both: only administrators load adapters")
        if self.adapters or self.adapter_folder is not None:
            if self.store is not None:
                raise UsageError("adapters need the model's experts in memory", "leave --expert-memory out")
            if self.patterns is not None:
                raise UsageError("--patterns does not go with adapters", "leave one of them out")
        if self.points and self.bytes_per_token is not None:
            raise UsageError("--points and --bytes-per-token both choose points", "give one of them")

    def _check_decoding(self) -> None:
        for name in self.decoding:
            if name not in DECODING:
                raise UsageError(f"requests cannot ask for '{name}'", f"--decoding takes {', '.join(DECODING)}")
        if (self.verifier is None) != ("des" not in self.decoding):
            raise UsageError("--verifier and --decoding des go together", "give both: a search needs to know what is good")
        if "rewiring" in self.decoding and self.store is not None:
            raise UsageError("rewiring needs the model's experts in memory", "leave --expert-memory out")

    def named_adapters(self) -> dict[str, str]:
        """Name -> folder of each. UsageError for an entry that is not of that form."""
        found: dict[str, str] = {}
        for entry in self.adapters:
            name, is_there, folder = entry.partition("=")
            if not is_there or not folder or not is_adapter_name(name):
                raise UsageError(f"--adapter '{entry[:80]}' is no NAME=FOLDER", ADAPTER_NAME)
            if name in found:
                raise UsageError(f"--adapter names '{name}' twice", "give each a name of its own")
            found[name] = folder
        return found


DECODING = ("scmoe", "des", "concise", "rewiring")
"""What requests may ask for. `self-draft` is a server's own matter (--self-draft), and `expert-rag` calls code that may take any time."""
ADAPTER_NAME = "a name has 1 to 64 letters, digits, dots, lines and underscores"


def is_adapter_name(name: str) -> bool:
    """Whether it can stand behind a model's name, and is the name of a folder: no sign in it separates anything."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None
