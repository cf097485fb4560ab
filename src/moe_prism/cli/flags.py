"""Flags from option classes: one per field, with the words, the default and the type that the field declares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from ..errors import UsageError
from ..options import Options, flag_of, option

PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
QUANTITY = re.compile(r"^\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([numµkKMGTP]?)(B/s|FLOPS|FLOP/s|B|s)\s*$")
EXAMPLES = {"B/s": "3350GB/s", "FLOPS": "989TFLOPS", "s": "4ms", "B": "300kB"}


@dataclass(frozen=True, kw_only=True)
class Run(Options):
    """What every command that writes a folder is asked."""

    resume: bool = option(False, "Continue an interrupted run; ends in the same bytes.")
    force: bool = option(False, "Replace an existing output.")
    json: bool = option(False, "One JSON object on stdout.")


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with flags in the place of its parameters that are option classes, which it gets filled in and checked.

    Words for a flag in the command's own docstring go before those of the field.
    """
    hints = get_type_hints(command, include_extras=True)
    own = dict(re.findall(r"^(\w+)\n    (.*)$", inspect.getdoc(command) or "", re.MULTILINE))  # words for parameters
    parameters: dict[str, inspect.Parameter] = {}
    classes: dict[str, type[Options]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if isinstance(hints[name], type) and issubclass(hints[name], Options):
            classes[name] = hints[name]
            for flag, kind, declared in _flags(hints[name], None):
                parameters.setdefault(flag, _parameter(flag, kind, declared, own))
        else:
            parameters[name] = parameter.replace(annotation=hints[name])

    def run(*given: Any, **named: Any) -> None:
        plain = {name: value for name, value in named.items() if name in hints and name not in classes}
        options = {name: _filled(kind, named, None) for name, kind in classes.items()}
        for each in options.values():
            each.check()  # before the command imports what it works with, which takes seconds
        return command(*given, **plain, **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return run


def _flags(kind: type[Options], wanted: tuple[str, ...] | None) -> Iterator[tuple[str, Any, Field[Any]]]:
    """(parameter name, type, field) of every field that is a flag; of a nested class of those it is wanted for."""
    hints = get_type_hints(kind)
    for declared in fields(kind):
        if "flags" in declared.metadata:
            yield from _flags(hints[declared.name], declared.metadata["flags"])
        elif "help" in declared.metadata and (wanted is None or declared.name in wanted):
            yield _name(declared), hints[declared.name], declared


def flags_of(kind: type[Options]) -> Iterator[tuple[str, Any, Field[Any]]]:
    """(parameter name, type, field) of every field of an option class that is a flag."""
    return _flags(kind, None)


def flag_classes(command: Callable[..., None]) -> list[type[Options]]:
    """The option classes among a command's parameters."""
    hints = get_type_hints(command, include_extras=True)
    return [kind for kind in hints.values() if isinstance(kind, type) and issubclass(kind, Options)]


def parameter_name(declared: Field[Any]) -> str:
    """n_sub of the field whose flag is --n-sub."""
    return _name(declared)


def _name(declared: Field[Any]) -> str:
    return flag_of(declared)[2:].replace("-", "_")


def _parameter(flag: str, kind: Any, declared: Field[Any], own: dict[str, str]) -> inspect.Parameter:
    default: Any = declared.default if declared.default_factory is MISSING else declared.default_factory()
    if declared.metadata.get("is_repeated"):
        kind, default = list[str] | None, None
    elif _is_list(kind):
        kind, default = str | None, ",".join(map(str, default)) or declared.metadata.get("empty")
    elif "unit" in declared.metadata:
        kind = str | None
    names = [flag_of(declared), *declared.metadata.get("short", ())]
    annotation = Annotated[kind, Parameter(name=names, help=own.get(flag, declared.metadata["help"]), negative_iterable="")]
    return inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple)


def _filled(kind: type[Options], given: dict[str, Any], wanted: tuple[str, ...] | None) -> Any:
    hints, values = get_type_hints(kind), {}
    for declared in fields(kind):
        if "flags" in declared.metadata:
            values[declared.name] = _filled(hints[declared.name], given, declared.metadata["flags"])
        elif (wanted is None or declared.name in wanted) and _name(declared) in given:
            values[declared.name] = _read(declared, hints[declared.name], given[_name(declared)])
    return kind(**values)


def _read(declared: Field[Any], kind: Any, given: Any) -> Any:
    """The field's value from what was given for its flag."""
    if declared.metadata.get("is_repeated"):
        return list(given or ())
    if _is_list(kind):
        if given is None:
            return get_origin(kind)()
        return get_origin(kind)(_entries(declared, get_args(kind)[0], given))
    if "unit" in declared.metadata and given is not None:
        return quantity(flag_of(declared), given, declared.metadata["unit"])
    return given


def _entries(declared: Field[Any], kind: type, text: str) -> list[Any]:
    default = declared.default if declared.default_factory is MISSING else declared.default_factory()
    if text == declared.metadata.get("empty"):
        return []
    if not text.strip(", "):
        if default:  # "" says that not even the default is wanted
            return []
        raise UsageError(f"{flag_of(declared)} is empty", "name something, or leave it out")
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        what = "counts" if kind is int else "numbers"
        raise UsageError(f"{flag_of(declared)} '{text}' is no list of {what}", "separate them with commas") from error


def quantity(flag: str, text: str, units: tuple[str, ...]) -> float:
    """The text "3350GB/s" gives 3.35e12. UsageError for another unit or no number."""
    found = QUANTITY.match(text)
    try:
        if found and found[3] in units:
            return float(found[1]) * PREFIXES[found[2]]
    except ValueError:
        pass
    raise UsageError(f"{flag} '{text}' is no quantity in {units[0]}", f"write it like {EXAMPLES[units[0]]}")
