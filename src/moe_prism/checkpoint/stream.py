"""Run or read a model that does not fit in memory: weights stay on disk until a layer needs them and leave when it is done."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..heap import return_freed_pages, return_large_buffers
from .config import WRONG
from .constant import VALUE, refuse_to_write
from .convert import ADVICE, Read, place, stored
from .mapped import DiskPart, ExpertTensors, disk_parts, load_first, load_mapped
from .shards import Source
from .whole import open_whole

EXPERTS_DIM = 3
"""Dimensions of a parameter that holds experts: expert, rows, columns."""


class LayerStream:
    """A transformers causal language model on the meta device whose parts are brought in from a safetensors folder by name.

    `model` is the whole module tree (eval mode; `find_layers(stream.model)` works). dtype: what `streaming` computes in; None
    takes config.json's, as `from_pretrained(dtype="auto")` does. A quantized checkpoint is dequantized as it is read, and is written
    again in `written` (see `open_source`). Remote code never runs. Raises UsageError for an unknown model or format, CorruptError
    for a folder that is not whole (`whole.py`).
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None, written: str | None = None) -> None:
        self._conversion = open_whole(folder, dtype, written)
        self.source, self.model, self.dtype = self._conversion.source, self._conversion.model, self._conversion.dtype
        _fill_buffers(self.model)
        self._empty = {name: tensor for name, tensor in stored(self.model) if name in self._conversion.expected}
        self.layers_prefix, self.num_layers = _decoder_layers(self.model)
        self.peak_bytes = 0
        self.room: Path | None = None  # a folder: there lie experts that do not fit in memory (`mapped.py`)
        self.is_trial = False  # of such experts one is read, and stands for all

    @property
    def unused(self) -> list[str]:
        """Tensors on disk that no parameter reads (for example the heads of multi-token prediction)."""
        return [name for name in self.source.names() if name not in self._conversion.owner]

    def layer_names(self) -> list[str]:
        """Module names of the decoder layers, in order."""
        return [f"{self.layers_prefix}.{i}" for i in range(self.num_layers)]

    def disk_names(self, prefix: str) -> list[str]:
        """Tensors on disk that feed the module called `prefix`."""
        return [name for name, target in self._conversion.owner.items() if target.startswith(f"{prefix}.")]

    def materialise(self, prefix: str, *, disk_dtype: bool = False, read: Read | None = None) -> nn.Module:
        """Load the parameters of one module (CPU, no grad) and return it.

        disk_dtype: keep the dtype of the files instead of the compute dtype, so that `disk_tensors` gives their bytes back.
        read: what to load by a tensor's name instead of what is on disk. UsageError names a tensor that is missing on disk.
        From then on this process gives large buffers back to the system (`heap.py`).
        """
        return_large_buffers()
        targets = [name for name in self._empty if name.startswith(f"{prefix}.")]
        names = self.disk_names(prefix)
        if self.room or self.is_trial:
            names = self._load_mapped(prefix, names, disk_dtype, read)
        self._load(targets, names, disk_dtype, read)
        return self.model.get_submodule(prefix)  # type: ignore[no-any-return]

    def release(self, prefix: str) -> None:
        """Drop the parameters of one module; it is on the meta device again, and the system has the memory."""
        for name, empty in self._empty.items():
            if name.startswith(f"{prefix}."):
                place(self.model, name, empty)
        return_freed_pages()

    @contextmanager
    def module(self, prefix: str, *, disk_dtype: bool = False, read: Read | None = None) -> Iterator[nn.Module]:
        """`materialise` for the length of a block."""
        try:
            yield self.materialise(prefix, disk_dtype=disk_dtype, read=read)
        finally:
            self.release(prefix)

    def disk_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Current weights of a materialised module as the files store them: exactly their names, shapes and dtypes (checked).

        Needs `disk_dtype=True`; UsageError names the tensor that would not come back as it is on disk.
        """
        return self._conversion.revert(self.state(prefix), self.disk_names(prefix))

    def disk_parts(self, prefix: str) -> Iterator[DiskPart]:
        """The same in parts; where experts lie on disk, a few of them each."""
        groups = self._mapped(prefix) if self.room else {}
        if not groups:
            yield DiskPart(self.disk_tensors(prefix))
            return
        state = self.state(prefix)
        rest = [name for name in self.disk_names(prefix) if self._conversion.owner[name] not in groups]
        if rest:
            yield DiskPart(self._conversion.revert({name: own for name, own in state.items() if name not in groups}, rest))
        yield from disk_parts(self._conversion, groups, state)

    def can_map(self, prefix: str) -> bool:
        """Whether all experts in this module can lie on disk: a few of them can be read from the files by themselves."""
        return bool(self._mapped(prefix)) and len(self._mapped(prefix)) == len(self._experts(prefix))

    def _experts(self, prefix: str) -> list[str]:
        """Parameters in this module that hold experts."""
        return [name for name, own in self._empty.items() if name.startswith(f"{prefix}.") and own.ndim == EXPERTS_DIM]

    def _mapped(self, prefix: str) -> dict[str, ExpertTensors]:
        """The tensors on disk of such parameters by their expert, where that can be told."""
        fed: dict[str, list[str]] = {name: [] for name in self._experts(prefix)}
        for name, target in self._conversion.owner.items():
            if target in fed:
                fed[target].append(name)
        found = {target: ExpertTensors.of(names, self._empty[target].shape[0], self.source) for target, names in fed.items()}
        return {target: groups for target, groups in found.items() if groups is not None}

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Current weights of a materialised module by their full names."""
        return {
            name: tensor.detach() for name, tensor in stored(self.model) if name in self._empty and name.startswith(f"{prefix}.")
        }

    def check_rewritable(self, prefix: str) -> None:
        """UsageError where the tensors of this module cannot be written back under the names they have on disk. Reads nothing."""
        refuse_to_write(self.source)
        names = set(self.disk_names(prefix))
        state = {name: tensor for name, tensor in self._empty.items() if name.startswith(f"{prefix}.")}
        try:
            found = self._conversion.disk_form(state, names)
        except WRONG as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"transformers cannot write the experts of '{prefix}' back: {reason}", "run this family from Python"
            ) from error
        if set(found) != names:
            name = min(set(found) ^ names)
            raise UsageError(f"tensor '{name}' does not come back from transformers' conversion under this name", ADVICE)

    def disk_form(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by their full names, of whatever shape, as tensors by the names the files use: for layers with other sizes."""
        return self._conversion.disk_form(state, set(self.source.names()))

    def feeds(self, parameters: Container[str]) -> list[str]:
        """Tensors on disk that feed any of these parameters (full names)."""
        return [name for name, target in self._conversion.owner.items() if target in parameters]

    @contextmanager
    def streaming(self) -> Iterator[Any]:
        """Yield the model ready for forward passes: everything but the decoder layers is resident, each layer only while it runs.

        Call it under `torch.no_grad()`. Parameters resident never exceed the non-layer ones plus one decoder layer.
        """
        handles: list[Any] = []
        with self.resident() as model:
            try:
                for name in self.layer_names():
                    layer = model.get_submodule(name)
                    handles.append(layer.register_forward_pre_hook(self._enter(name)))
                    handles.append(layer.register_forward_hook(self._leave(name), always_call=True))
                yield model
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def resident(self) -> Iterator[Any]:
        """Yield the model with everything but its decoder layers in memory, which `materialise` brings in; afterwards it is empty again."""
        inside = tuple(f"{name}." for name in self.layer_names())
        outside = [name for name in self._empty if not name.startswith(inside)]
        try:
            self._load(outside, [n for n, target in self._conversion.owner.items() if not target.startswith(inside)], False)
            yield self.model
        finally:
            for name, empty in self._empty.items():
                place(self.model, name, empty)

    def keep_outside(self, prefixes: Iterable[str]) -> Any:
        """Load all parameters that are not in the modules called `prefixes`, for good, and return the model: those stay empty.

        Constants in the place of experts are loaded too.
        """
        inside = tuple(f"{name}." for name in prefixes)
        outside = {name for name in self._empty if not name.startswith(inside) or name.endswith(f".{VALUE}")}
        self._load(sorted(outside), [n for n, target in self._conversion.owner.items() if target in outside], False)
        return self.model

    def resident_bytes(self) -> int:
        """Bytes of the parameters and stored buffers that are in memory now, tied ones once."""
        found = {
            tensor.data_ptr(): tensor.nbytes for name, tensor in stored(self.model) if name in self._empty and not tensor.is_meta
        }
        return sum(found.values())

    def _enter(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.materialise(name)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.release(name)

        return hook

    def _load_mapped(self, prefix: str, names: list[str], disk_dtype: bool, read: Read | None) -> list[str]:
        """Bring in experts whose weights lie on disk; the names of all other tensors."""
        groups = self._mapped(prefix)
        empty: dict[str, Tensor] = {
            target: _like(self._empty[target], self.source.info(own.names(0, 1)[0]).torch_dtype)
            if disk_dtype
            else self._empty[target]
            for target, own in groups.items()
        }
        if groups and self.is_trial:
            load_first(self._conversion, groups, empty)
        elif groups and self.room:
            load_mapped(self._conversion, groups, empty, self.room, read)
        return [name for name in names if self._conversion.owner[name] not in groups]

    def _load(self, targets: list[str], names: list[str], disk_dtype: bool, read: Read | None = None) -> None:
        if disk_dtype:
            for name in names:  # the loader casts to the dtype of the empty parameter it fills
                target = self._conversion.owner[name]
                dtype = self.source.info(name).torch_dtype
                place(self.model, target, _like(self._empty[target], dtype))
        narrow = {} if disk_dtype or read else self._narrow(targets, names)
        for target, dtype in narrow.items():
            place(self.model, target, _like(self._empty[target], dtype))
        self._conversion.load(names, read)
        for target in narrow:
            wide = self.model.get_parameter(target).detach().to(self.dtype)
            place(self.model, target, nn.Parameter(wide, requires_grad=False))
        tied = getattr(self.model, "all_tied_weights_keys", {})
        loaded = dict(stored(self.model))
        missing = {name for name in targets if loaded[name].is_meta}
        if missing & ({*tied} | {*tied.values()}):
            self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
            loaded = dict(stored(self.model))
        for name in targets:
            if loaded[name].is_meta:
                raise UsageError(
                    f"'{self.source.folder}' has no weights for parameter '{name}'", "check config.json against the weights"
                )
            loaded[name].requires_grad_(False)
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes())

    def _narrow(self, targets: Container[str], names: Iterable[str]) -> dict[str, torch.dtype]:
        """Experts that are put together from many tensors of a narrower type: the type in which that is done, {parameter: type}.

        Their parts, the stacked parts and the result lie side by side for a while. Widened after that they are the same values.
        """
        if type(self.source) is not Source:  # what is dequantized has no type of its own
            return {}
        parts: dict[str, list[torch.dtype]] = {}
        for name in names:
            parts.setdefault(self._conversion.owner[name], []).append(self.source.info(name).torch_dtype)
        return {
            target: dtypes[0]
            for target, dtypes in parts.items()
            if len(dtypes) > 1
            and len(set(dtypes)) == 1
            and dtypes[0] in (torch.bfloat16, torch.float16)
            and self.dtype == self._empty[target].dtype == torch.float32
            and self._empty[target].ndim == EXPERTS_DIM
            and target in targets
        }


def _like(empty: Tensor, dtype: torch.dtype) -> Tensor:
    fresh = torch.empty_like(empty, dtype=dtype, device="meta")
    return nn.Parameter(fresh, requires_grad=False) if isinstance(empty, nn.Parameter) else fresh


def _fill_buffers(model: Any) -> None:
    """Compute buffers that no file holds (rotary frequencies), the way transformers does after a meta-device load."""
    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in model.named_modules():
        empty = [
            n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None and module._buffers[n].is_meta
        ]
        for leaf in empty:
            setattr(module, leaf, torch.zeros_like(getattr(module, leaf), device="cpu"))
        if empty:
            nearest = max((owner for owner in owners if owner == "" or f"{name}.".startswith(f"{owner}.")), key=len)
            owners[nearest]._init_weights(module)


def _decoder_layers(model: Any) -> tuple[str, int]:
    """Name and length of the list of decoder layers: the outermost list as long as the config says."""
    config = model.config.get_text_config(decoder=True)
    # LongCat counts the two attention layers that each of its layers holds
    for count in dict.fromkeys((config.num_hidden_layers, getattr(config, "num_layers", None))):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
        if lists:
            return min(lists, key=lambda name: name.count(".")), count
    raise UsageError(
        f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers", "this family cannot be streamed"
    )
