"""Names and shapes on disk <-> parameters in memory, for a part of a model, by transformers' own conversion rules.

transformers 5 stores experts as 3-D tensors and converts per-expert files on load. Nothing here knows a family's names: the rules
come from `get_model_conversion_mapping`, and what they give back is compared with the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..errors import DoesNotFit, UsageError
from .shards import Source

Read = Callable[[str], Tensor]
NO_MEMORY = re.compile(r"\bMemoryError\b|allocate memory|not enough memory")
LARGER = "use --low-memory, free some, or take a larger machine"


class Lazy:
    """Stands for a tensor on disk; the conversion reads it with `[...]` when its turn comes."""

    def __init__(self, read: Read, name: str) -> None:
        self.read, self.name = read, name

    def __getitem__(self, _: Any) -> Tensor:
        return self.read(self.name)


class LazyShape:
    """The same without its values, to see where a tensor would go and whether it fits."""

    def __init__(self, source: Source, name: str) -> None:
        self.shape = source.info(name).shape

    def __getitem__(self, _: Any) -> Tensor:
        return torch.empty(self.shape, device="meta")


class Verdict(NamedTuple):
    """What a load would end with: parameters nothing feeds, and parameters that cannot be made from what feeds them, with the reason."""

    missing: set[str]
    wrong: dict[str, str]


class Conversion:
    """The conversion rules of one model applied to one source. `owner`: name on disk -> (first) parameter it feeds."""

    def __init__(self, model: Any, source: Source, dtype: torch.dtype) -> None:
        self.model, self.source, self.dtype = model, source, dtype
        self.rules: list[Any] = get_model_conversion_mapping(model)
        self.expected: set[str] = set(model.state_dict())
        self._turned: dict[
            str, tuple[str, int, int]
        ] = {}  # tensors that a rule turns round if their shape wants it, and this one does
        self._upright: dict[str, str] = {}  # those that such a rule leaves as they are
        self.owner = {name: target for name, target in self._targets() if target in self.expected}
        model._weight_conversions = [rule for rule in self.rules if rule.was_used()]  # what `revert_weight_conversion` undoes

    def load(self, names: Iterable[str], read: Read | None = None) -> None:
        """Put these tensors into the model's parameters, on CPU. UsageError if transformers cannot convert or place one.

        read: gives the tensor of a name, default as it is on disk.
        """
        wrong = self._load({name: Lazy(read or self.source.tensor, name) for name in names}, "cpu").wrong
        if wrong:
            name, why = next(iter(wrong.items()))
            raise UsageError(f"tensor '{name}' {why}", "check that config.json belongs to these weights")

    def try_load(self) -> Verdict:
        """What loading every tensor would end with. Nothing is read, and the model stays as it is."""
        before = [(name, tensor) for name, tensor in stored(self.model) if name in self.expected]
        try:
            return self._load({name: LazyShape(self.source, name) for name in self.owner}, "meta")
        finally:
            for name, tensor in before:
                place(self.model, name, tensor)

    def _load(self, state: Mapping[str, Lazy | LazyShape], device: str) -> Verdict:
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            device_map={"": device},
            weight_mapping=self.rules,
        )
        try:
            with quiet():
                info, _ = convert_and_load_state_dict_in_model(self.model, dict(state), config, disk_offload_index=None)
        except (MemoryError, RuntimeError) as error:
            _check_memory(repr(error))
            raise
        for text in info.conversion_errors.values():
            _check_memory(text)
        wrong = {name: f"cannot be made: {text.strip().splitlines()[-1]}" for name, text in info.conversion_errors.items()}
        wrong |= {n: f"is {tuple(found)} on disk, {tuple(wanted)} by config.json" for n, found, wanted in info.mismatched_keys}
        return Verdict(set(info.missing_keys), wrong)

    def revert(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors on disk called `names`, from parameters `state` (full names). UsageError naming any that differs."""
        wanted = set(names)
        found = self.disk_form(state, wanted)
        different = sorted(wanted ^ set(found))
        if different:
            raise UsageError(f"tensor '{different[0]}' does not come back from transformers' conversion under this name", ADVICE)
        self.check_form(found)
        return found

    def check_form(self, found: Mapping[str, Tensor], rows: int | None = None) -> None:
        """UsageError naming a tensor that is not as the files store it. rows: so many of the leading dimension are there."""
        for name, tensor in found.items():
            info = self.source.info(name)
            shape = info.shape if rows is None else (rows, *info.shape[1:])
            if (tuple(tensor.shape), tensor.dtype) != (shape, info.torch_dtype):
                here, disk = f"{tensor.dtype} {tuple(tensor.shape)}", f"{info.torch_dtype} {shape}"
                raise UsageError(f"tensor '{name}' is {disk} on disk and comes back as {here}", ADVICE)

    def disk_form(self, state: dict[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
        """Parameters `state` (full names, any shapes) as the files would store them; names: those of the files."""
        found: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        prefix = f"{self.model.base_model_prefix}."
        # A checkpoint saved from the bare base model lacks its prefix; loading adds it silently, so it is taken off here.
        bare = not any(name.startswith(prefix) for name in self.owner)
        for name, (
            target,
            one,
            other,
        ) in self._turned.items():  # going back, the rule would look at shapes, which an edit may change
            if name in found and target in state:
                found[name] = state[target].transpose(one, other).contiguous()
        for name, target in self._upright.items():
            if name in found and target in state:
                found[name] = state[target]
        strip = {name for name in found if name not in names and (bare or name.removeprefix(prefix) in names)}
        return {name.removeprefix(prefix) if name in strip else name: tensor for name, tensor in found.items()}

    def _targets(self) -> Iterator[tuple[str, str]]:
        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        meta, prefix = self.model.state_dict(), self.model.base_model_prefix
        turns: dict[str | None, Transpose] = {
            rule.source_patterns[0]: op
            for rule in converters
            for op in rule.operations
            if isinstance(op, Transpose) and op.check_dims and len(rule.operations) == 1
        }
        # sorted as the loader sorts: some rules switch themselves on at the first name they meet
        for name in sorted(self.source.names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
            if target not in meta and name in meta:
                target, _ = rename_source_key(name, [], [], prefix, meta)
            turn = turns.get(pattern)
            if turn and target in meta:
                if self.source.info(name).shape == tuple(meta[target].shape):
                    self._upright[name] = target
                else:
                    self._turned[name] = (target, turn.dim0, turn.dim1)
            yield name, target


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer of this full name."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)


def disk_state(model: Any) -> dict[str, Tensor]:
    """All weights of an in-memory model under the names its family uses on disk; tied copies are left out."""
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    found: dict[str, Tensor] = revert_weight_conversion(model, state)
    return found


ADVICE = "save the model once with transformers' save_pretrained and use that folder"


@contextmanager
def quiet() -> Iterator[None]:
    """No transformers progress bars: library code prints nothing, and a bar per layer is noise."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_memory(text: str) -> None:
    """DoesNotFit where an error is that of an allocation. transformers keeps those of experts as one of their tensors."""
    if NO_MEMORY.search(text):
        raise DoesNotFit("there is not enough memory to load this part of the model", LARGER)
