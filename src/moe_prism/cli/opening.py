"""What every command that opens or runs a model is asked beside its own flags: where the model comes from, and where it computes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import DoesNotFit, UsageError
from ..memory import available_memory
from ..options import Options, option
from ..options.place import TYPE_WORDS, ComputeType, Placement
from .flags import Run, flag_classes

RUNS = ("calibrate", "refactor", "adopt", "prune", "recover", "skip", "frontier", "evaluate", "generate", "serve", "trace")
"""Commands that run a model themselves."""
ANY_MODEL = ("skip", "generate")
"""Commands that call it a folder and take every model."""
CONFIG_ALONE = ("forecast", "doctor")
"""Commands for which config.json may be enough: they look for it by themselves."""

STARTING = 400 << 20
"""Bytes that such a command takes before it has looked at a model: torch, transformers, compiled code. 373 MB were measured."""


@dataclass(frozen=True, kw_only=True)
class Opening(Options):
    """Of every command that opens a model."""

    follow_links: bool = option(False, "Follow links in a model's folder that lead out of it; only for folders you trust.")
    revision: str | None = option(None, "Branch, tag or commit of a model that is named as OWNER/MODEL on its hub.")


@dataclass(frozen=True, kw_only=True)
class WriterPlacement(Placement):
    """The same where --dtype is the type of what is written."""

    dtype: ComputeType | None = option(None, TYPE_WORDS, flag="compute_dtype")


def opening(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `Opening`, if its first parameter is a model, and with `Placement`, if it runs one.

    OWNER/MODEL becomes the folder in the hub's cache before the command sees it.
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    first, name = next(iter(signature.parameters)), command.__name__
    if first not in ("model", "folder", "quantized") or name == "verify":  # which takes plain files only
        return command
    added: dict[str, type[Options]] = {"source": Opening}
    if name in RUNS:
        added["place"] = Placement if type_flag(command) == "--dtype" else WriterPlacement

    def run(*given: Any, source: Opening, place: Placement | None = None, **named: Any) -> None:
        if name in RUNS:
            _check_start()
        with ExitStack() as stack:
            if source.follow_links:
                from ..checkpoint import follow_links

                stack.enter_context(follow_links())
            if source.revision is not None:
                from ..model.hub import at_revision

                stack.enter_context(at_revision(source.revision))
            if place is not None and place != type(place)():
                from ..model.place import placed

                stack.enter_context(placed(place))
            found = [_located(given[0], source, name), *given[1:]] if given else []
            if "elastic" in named:  # the folder that `adopt` compares with
                named["elastic"] = _located(named["elastic"], Opening(), name)
            if found and name not in CONFIG_ALONE:
                _look(found[0], first != "folder" or name in ANY_MODEL)
            _check_free(named)
            return command(*found, **named)

    own = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for key, kind in added.items()]
    run.__name__, run.__doc__ = name, command.__doc__
    run.__annotations__ = {**hints, **added}
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
    return run


def type_flag(command: Callable[..., None]) -> str:
    """How the command calls the type that a model computes in: --dtype is another one where a model is written."""
    return "--compute-dtype" if any("dtype" in get_type_hints(kind) for kind in flag_classes(command)) else "--dtype"


def _check_start() -> None:
    """DoesNotFit where a control group's limit would end the process while it loads its libraries: that happens without a word."""
    if (free := available_memory()) < STARTING:
        raise DoesNotFit(
            f"{free >> 20} MiB of memory are free here, and a command that runs a model takes {STARTING >> 20} MiB to start",
            "raise the limit of the container or control group, or end other processes",
        )


def _check_free(named: dict[str, Any]) -> None:
    """Refuse an output that lies there already before the command imports what it works with. The command looks again, under its lock."""
    run, out, division = (named.get(key) for key in ("run", "out", "division"))
    if not isinstance(run, Run) or out is None or run.resume or "RANK" in os.environ or getattr(division, "shard", None):
        return  # of what goes on, of torchrun's processes and of a part of the layers, the command knows what belongs to it
    if Path(out).name in ("", ".."):
        return  # it may be the model's own folder, of which the command says more
    from ..checkpoint.atomic import check_output

    check_output(out, force=run.force)


def _look(given: Any, is_any: bool) -> None:
    """Refuse a model that is not there, or a plain folder with broken headers, before the command imports what it works with.

    The command looks again, then at every tensor, for which it needs transformers.
    is_any: whether the command takes every model, and says nothing else of one that is not there.
    """
    if is_any:
        from ..model.named import resolve

        folder = resolve(given)
    elif (Path(given) / "config.json").is_file():
        folder = Path(given)
    else:
        return
    if folder.is_dir() and not (folder / "prism.json").exists():  # what has a manifest is held against that first
        from ..checkpoint.shards import Source
        from ..schema.config import check_config

        check_config(Source(folder).config(), str(folder / "config.json"))


def _located(given: Any, source: Opening, command: str) -> Any:
    """The model as the command was given it, or its folder in the hub's cache, of the same type."""
    text = str(given)
    if Path(text).exists() or "/" not in text:  # most paths, and the shipped names: known without a library
        if source.revision is not None:
            raise UsageError(f"--revision belongs to a model on a hub, and '{text}' is on this machine", "leave it out")
        return given
    from ..model.hub import is_hub_name

    if command in CONFIG_ALONE or not is_hub_name(text):
        return given
    from ..model import resolve

    return type(given)(resolve(text)) if isinstance(given, str) else resolve(text)
