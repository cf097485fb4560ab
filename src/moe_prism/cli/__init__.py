"""The `moe-prism` command. Modules here import the library inside their functions, so that `--help` needs no torch."""

from __future__ import annotations

import errno
import inspect as reflection
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cyclopts

from ..cores import settle_threads
from ..errors import DoesNotFit, PrismError, memory_ran_out
from . import (
    adapter,
    adopt,
    bench,
    calibrate,
    demo,
    doctor,
    edits,
    evaluate,
    forecast,
    frontier,
    generate,
    inspect,
    listing,
    offload,
    offload_fit,
    patterns,
    place,
    prune,
    recipe,
    recover,
    refactor,
    report,
    route,
    serve,
    skip,
    split,
    trace,
    train,
    verify,
)
from .flags import with_flags
from .opening import opening
from .output import Unwritten, noted_reading, plain_line

INTERRUPTED = 130
RESUMABLE = ("run", "calibrate", "refactor", "adopt", "recover", "prune", "compress", "split", "train")


def build() -> cyclopts.App:
    """The application with all its commands."""
    from .. import __version__

    app = cyclopts.App(
        name="moe-prism",
        help="Make Mixture-of-Experts language models elastic: the same weights at any price between cheap and full quality.",
        version=__version__,
        help_format="plaintext",
        # by default cyclopts would end the process itself, also when interrupted; `main` decides about exit codes
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    every: tuple[tuple[Callable[..., None], str], ...] = (
        (demo.demo, "demo"),
        (doctor.doctor, "doctor"),
        (inspect.inspect, "inspect"),
        (calibrate.calibrate, "calibrate"),
        (refactor.refactor, "refactor"),
        (adopt.adopt, "adopt"),
        (prune.prune, "prune"),
        (edits.compress, "compress"),
        (split.split, "split"),
        (train.train, "train"),
        (patterns.patterns, "patterns"),
        (recover.recover, "recover"),
        (adapter.adapter, "adapter"),
        (skip.skip, "skip"),
        (frontier.frontier, "frontier"),
        (evaluate.evaluate, "eval"),
        (report.report, "report"),
        (forecast.forecast, "forecast"),
        (generate.generate, "generate"),
        (serve.serve, "serve"),
        (route.route, "route"),
        (bench.bench, "bench"),
        (trace.trace, "trace"),
        (offload.offload, "offload"),
        (place.place, "place"),
        (verify.verify, "verify"),
        (recipe.run, "run"),
        (recipe.recipe, "recipe"),
        (listing.ls, "ls"),
    )
    for nth, (command, name) in enumerate(every):  # --help lists them as they are used, not by the alphabet
        if name == "offload":  # a command with one below it; a folder of that name is ./fit
            both = cyclopts.App(name=name, help_format="plaintext", result_action="return_value", sort_key=nth)
            both.default(with_flags(opening(_described(command))))
            both.command(with_flags(_described(offload_fit.fit)), name="fit")
            app.command(both)
            continue
        app.command(with_flags(opening(_described(command))), name=name, sort_key=nth)
    app.command(with_flags(opening(_described(forecast.forecast))), name="plan", show=False)  # its name in 0.1
    return app


def _described(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its "name: text" parameters in numpydoc's two lines; what cyclopts reads in one line is a name and its type.

    Lines that only the width of the source broke are joined: the terminal breaks them again.
    """
    head, title, parameters = reflection.cleandoc(command.__doc__ or "").partition("\nParameters\n----------\n")
    if re.search(r"^\w+$", parameters, re.MULTILINE):
        return command  # an earlier `build` did it
    head, parameters = re.sub(r"(?<=\S)\n(?=\S)", " ", head), re.sub(r"\n +", " ", parameters)
    command.__doc__ = head + title + re.sub(r"^(\w+): ", r"\1\n    ", parameters, flags=re.MULTILINE)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. 0 done, 1 failed, 2 bad usage, 3 does not fit, 4 corrupt, 130 interrupted."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars; ours say which stage is running
    settle_threads()
    app = build()
    try:
        with noted_reading():
            app(tokens, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        known = " ".join(["moe-prism", *(name for name in tokens[:1] if name in app)])
        return _fail(re.sub(r"(?<!\.)\.$", "", plain_line(str(error))), f"see `{known} --help`", 2, "--json" in tokens)
    except PrismError as error:
        as_json = "--json" in tokens and not isinstance(error, Unwritten)
        return _fail(error.cause, error.next_step, error.exit_code, as_json, getattr(error, "needed", None))
    except KeyboardInterrupt:
        resumable = tokens[:1] and tokens[0] in RESUMABLE and not {"--report-only", "--dry-run"} & {*tokens}
        next_step = "go on with --resume" if resumable else "run it again; it starts from the beginning"
        return _fail("interrupted", next_step, INTERRUPTED, "--json" in tokens)
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        next_step = "use --low-memory and a smaller --reservoir where the command has them, or a larger machine"
        return _fail("memory ran out", next_step, DoesNotFit.exit_code, "--json" in tokens)
    except OSError as error:
        cause = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
        code = DoesNotFit.exit_code if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1
        return _fail(cause, "check the path, its permissions and the free space", code, "--json" in tokens)
    return 0


def _fail(cause: str, next_step: str, code: int, as_json: bool, needed: Mapping[str, Any] | None = None) -> int:
    """needed: what a job needs that does not fit."""
    line = f"{cause}; {next_step}" if next_step else cause
    sys.stderr.write(f"moe-prism: error: {plain_line(line)}\n")
    if as_json:
        found = {"error": cause, "next_step": next_step, "exit_code": code, **({"needed": dict(needed)} if needed else {})}
        sys.stdout.write(json.dumps(found, default=str) + "\n")
    return code


def entry() -> None:
    """Console script."""
    sys.exit(main())
