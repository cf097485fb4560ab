"""What a recipe may say: one pydantic model per command, made of the command's own flags. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import BaseModel, ConfigDict

from ..options import Options
from ..options.place import Placement
from . import calibrate, compress, evaluate, frontier, prune, recover, refactor, skip, trace, verify
from .flags import flag_classes, flags_of, parameter_name

COMMANDS: Mapping[str, Callable[..., None]] = {
    "calibrate": calibrate.calibrate,
    "refactor": refactor.refactor,
    "prune": prune.prune,
    "compress": compress.compress,
    "recover": recover.recover,
    "skip": skip.skip,
    "frontier": frontier.frontier,
    "eval": evaluate.evaluate,
    "trace": trace.trace,
    "verify": verify.verify,
}
"""Commands that can be a step, by name."""
WRITES_MODEL = ("refactor", "prune", "compress", "recover")
"""Steps whose output is the model of the steps after them."""
OF_THE_RUN = ("resume", "force", "json", "dry_run", "for_machine", "report_only")
"""Flags that are no part of a recipe: they say how it is run."""
STEP_MODEL = "model"


class RecipePart(BaseModel):
    """Nothing that is not known."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def flags(command: str) -> dict[str, tuple[Any, Field[Any] | None]]:
    """(type, declared field) of every flag of a command by its name in a recipe; no field for a parameter of the command itself."""
    function = COMMANDS[command]
    hints = get_type_hints(function, include_extras=True)
    first = next(iter(inspect.signature(function).parameters))
    found: dict[str, tuple[Any, Field[Any] | None]] = {}
    for name in inspect.signature(function).parameters:
        if isinstance(hints[name], type) and issubclass(hints[name], Options):
            for declared_name, kind, declared in flags_of(hints[name]):
                found.setdefault(declared_name, (kind, declared))
        elif name != first:
            found[name] = (_plain(hints[name]), None)
    return {name: value for name, value in found.items() if name not in OF_THE_RUN}


@cache
def step_form(command: str) -> type[BaseModel]:
    """The options of one command as a pydantic model."""
    signature = inspect.signature(COMMANDS[command])
    words = dict(re.findall(r"^(\w+)(?:: |\n    )(.*)$", inspect.getdoc(COMMANDS[command]) or "", re.MULTILINE))
    fields: dict[str, Any] = {
        STEP_MODEL: (str | None, pydantic.Field(None, description="Its input. Default: the output of the step before."))
    }
    for name, (kind, declared) in flags(command).items():
        if declared is None:
            default = signature.parameters[name].default
            default = ... if default is inspect.Parameter.empty else str(default) if isinstance(default, Path) else default
            fields[name] = (kind, pydantic.Field(default, description=words.get(name)))
        else:
            fields[name] = (_ranged(kind, declared), pydantic.Field(_default(declared), description=declared.metadata["help"]))
    return pydantic.create_model(f"{command.capitalize()}Step", __base__=RecipePart, __doc__=f"moe-prism {command}", **fields)


@cache
def recipe_form() -> type[BaseModel]:
    """A whole recipe."""
    commands: dict[str, Any] = {name: (step_form(name) | None, None) for name in COMMANDS}
    step: Any = pydantic.create_model(
        "Step", __base__=RecipePart, __doc__="One command: its name, and its flags below.", **commands
    )
    place = {
        name: (kind | None, pydantic.Field(None, description=declared.metadata["help"]))
        for name, kind, declared in flags_of(Placement)
    }
    fields: dict[str, Any] = {
        "version": (Literal[1], 1),
        "model": (str, pydantic.Field(description="Folder, .gguf file, OWNER/MODEL of a hub, nano or nano-mix.")),
        "revision": (str | None, pydantic.Field(None, description="Of OWNER/MODEL.")),
        "follow_links": (bool, False),
        **place,
        "steps": (list[step], pydantic.Field(min_length=1, max_length=100)),
    }
    return pydantic.create_model(
        "Recipe", __base__=RecipePart, __doc__="A whole job of moe-prism: a model, and the commands to run on it.", **fields
    )


def words_of(command: str, given: Mapping[str, Any]) -> list[str]:
    """The words of a command line that say the same as a step's options; those that have their default are left out."""
    form, words = step_form(command), []
    for name, value in given.items():
        if name == STEP_MODEL or value is None or value == form.model_fields[name].default:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple) and _is_repeated(command, name):
            words += [word for each in value for word in (flag, str(each))]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return words


def check_options(command: str, given: Mapping[str, Any]) -> None:
    """What the command itself would refuse later: ranges that depend on each other, names that no registry has. May import torch."""
    function = COMMANDS[command]
    for kind in flag_classes(function):
        own = {parameter_name(f): f for _, _, f in flags_of(kind)}
        values = {f.name: given[name] for name, f in own.items() if name in given and hasattr(kind, "__dataclass_fields__")}
        known = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        kind(**known).check()


def _is_repeated(command: str, name: str) -> bool:
    declared = flags(command)[name][1]
    return declared is not None and bool(declared.metadata.get("is_repeated"))


def _plain(hint: Any) -> Any:
    """The type below cyclopts's annotations, as YAML can say it."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        kinds = [_plain(kind) for kind in get_args(hint)]
        return Union[tuple(kinds)]  # noqa: UP007
    return str if hint is Path else hint


def _default(declared: Field[Any]) -> Any:
    found = declared.default if declared.default_factory is MISSING else declared.default_factory()
    return list(found) if isinstance(found, tuple) else str(found) if isinstance(found, Path) else found


def _ranged(kind: Any, declared: Field[Any]) -> Any:
    """The field's type with its bounds; of a list, those of its entries."""
    said = declared.metadata
    bounds = {
        ours: said[word] for word, ours in (("least", "ge"), ("above", "gt"), ("most", "le"), ("below", "lt")) if word in said
    }
    if get_origin(kind) in (list, tuple):
        entry: Any = _plain(get_args(kind)[0])
        ranged_entry: Any = Annotated[entry, pydantic.Field(**bounds)] if bounds else entry
        return list[ranged_entry]
    if "unit" in said:  # written with its unit, like 3350GB/s
        return str | None
    plain = _plain(kind)
    if not bounds:
        return plain
    parts = [part for part in (get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)) if part is not NoneType]
    ranged: Any = Annotated[parts[0], pydantic.Field(**bounds)]
    return ranged | None if len(parts) < len(get_args(plain) or (plain,)) else ranged
