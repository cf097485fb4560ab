"""Names and shapes on disk <-> parameters in memory, for a part of a model, by transformers' own conversion rules.

transformers 5 stores experts as 3-D tensors and converts per-expert files on load. Nothing here knows a family's names: the rules
come from `get_model_conversion_mapping`, and what they give back is compared with the files.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..errors import UsageError
from .shards import Source

Read = Callable[[str], Tensor]


class Lazy:
    """Stands for a tensor on disk; the conversion reads it with `[...]` when its turn comes."""

    def __init__(self, read: Read, name: str) -> None:
        self.read, self.name = read, name

    def __getitem__(self, _: Any) -> Tensor:
        return self.read(self.name)


class Conversion:
    """The conversion rules of one model applied to one source. `owner`: name on disk -> (first) parameter it feeds."""

    def __init__(self, model: Any, source: Source, dtype: torch.dtype) -> None:
        self.model, self.source, self.dtype = model, source, dtype
        self.rules: list[Any] = get_model_conversion_mapping(model)
        self.expected: set[str] = set(model.state_dict())
        self.owner = {name: target for name, target in self._targets() if target in self.expected}
        model._weight_conversions = [rule for rule in self.rules if rule.was_used()]  # what `revert_weight_conversion` undoes

    def load(self, names: Iterable[str], read: Read | None = None) -> None:
        """Put these tensors into the model's parameters, on CPU. UsageError if transformers cannot convert or place one.

        read: gives the tensor of a name, default as it is on disk.
        """
        config = LoadStateDictConfig(
            dtype=self.dtype, dtype_plan=self.model._get_dtype_plan(self.dtype), device_map={"": "cpu"}, weight_mapping=self.rules
        )
        state = {name: Lazy(read or self.source.tensor, name) for name in names}
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config, disk_offload_index=None)
        problems = [f"'{name}': {text.strip().splitlines()[-1]}" for name, text in info.conversion_errors.items()]
        problems += [
            f"'{name}' is {tuple(found)} on disk, {tuple(wanted)} by config.json" for name, found, wanted in info.mismatched_keys
        ]
        if problems:
            raise UsageError(f"tensor {problems[0]}", "check that config.json belongs to these weights")

    def revert(self, state: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors on disk called `names`, from parameters `state` (full names). UsageError naming any that differs."""
        wanted = set(names)
        found = self.disk_form(state, wanted)
        different = sorted(wanted ^ set(found))
        if different:
            raise UsageError(f"tensor '{different[0]}' does not come back from transformers' conversion under this name", ADVICE)
        for name, tensor in found.items():
            info = self.source.info(name)
            if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.torch_dtype):
                here, disk = f"{tensor.dtype} {tuple(tensor.shape)}", f"{info.torch_dtype} {info.shape}"
                raise UsageError(f"tensor '{name}' is {disk} on disk and comes back as {here}", ADVICE)
        return found

    def disk_form(self, state: dict[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
        """Parameters `state` (full names, any shapes) as the files would store them; names: those of the files."""
        found: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        prefix = f"{self.model.base_model_prefix}."
        # A checkpoint saved from the bare base model lacks its prefix; loading adds it silently, so it is taken off here.
        return {name if name in names else name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def _targets(self) -> Iterator[tuple[str, str]]:
        renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        meta, prefix = self.model.state_dict(), self.model.base_model_prefix
        # sorted as the loader sorts: some rules switch themselves on at the first name they meet
        for name in sorted(self.source.names(), key=dot_natural_key):
            target, _ = rename_source_key(name, renamings, converters, prefix, meta)
            if target not in meta and name in meta:
                target, _ = rename_source_key(name, [], [], prefix, meta)
            yield name, target


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
