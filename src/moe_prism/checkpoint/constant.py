"""Constant experts, in the form that vLLM 0.33 reads: an expert that went keeps its id and its router row, and returns one stored vector.

config.json lists them by decoder layer in `approximate_experts`; the vector of expert 3 is the tensor `<experts>.3.approx_value` [d]. The
experts that stay keep their ids in the names, so a layer's ids have gaps. transformers knows nothing of this: `CompactSource` shows it
experts without gaps, `substitute` gives the empty model that many, and the modules take the router's ids apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CorruptError, UsageError
from .header import RESTORE, Header, TensorInfo
from .shards import Bytes, Source

CONFIG_KEY = "approximate_experts"
VALUE = "approx_value"
ANY_ID = ("_moe_prism_function", "_moe_prism_forward_before")
"""What a module carries while a function of ours computes its experts: one that takes an id beyond them for none."""
CALL = ("hidden_states", "top_k_index", "top_k_weights")
"""How experts are called, by position or by name."""
MOST_EXPERTS = 1 << 20
_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<id>\d{1,7})\.(?P<rest>.+)")


def constant_experts(config: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """{decoder layer: sorted ids} of the constant experts that config.json lists; {} for none. CorruptError for another form."""
    text = config.get("text_config")
    found = config.get(CONFIG_KEY) or (text.get(CONFIG_KEY) if isinstance(text, dict) else None)
    if found is None:
        return {}
    try:
        return {int(layer): _ids(ids) for layer, ids in found.items() if ids}
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptError(f"'{CONFIG_KEY}' of config.json must map layers to different expert ids", RESTORE) from error


def _ids(ids: Any) -> tuple[int, ...]:
    if any(type(i) is not int or not 0 <= i < MOST_EXPERTS for i in ids) or len(set(ids)) != len(ids):
        raise ValueError
    return tuple(sorted(ids))


def layer_number(name: str) -> int:
    """The decoder layer in a module's name, as vLLM tells it: the only number in it; -1 where there are several, or none."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else -1


def expert_name(name: str) -> tuple[str, int, str] | None:
    """(path of the experts, id, rest) of the name of one expert's own tensor; None for any other, shared experts included."""
    found = _EXPERT.fullmatch(name)
    if found is None or not found["experts"].endswith("experts") or "shared" in found["experts"].rpartition(".")[2]:
        return None
    return found["experts"], int(found["id"]), found["rest"]


class CompactSource(Source):
    """`raw` with the experts that stay numbered without gaps, and one tensor `<experts>.approx_value` [C, d] of a layer's constants.

    It is read, and not written again: its tensors have no bytes of their own in a file.
    """

    def __init__(self, raw: Source, constants: Mapping[int, tuple[int, ...]]) -> None:
        self.raw, self.constants = raw, constants
        self.folder, self.index_file = raw.folder, raw.index_file
        self._names: dict[str, tuple[str, ...]] = {}
        self._infos, self._headers = {}, {}
        values: dict[str, dict[int, str]] = {}
        for name in raw.names():
            new, parts = name, expert_name(name)
            gone = constants.get(layer_number(parts[0]), ()) if parts else ()
            if parts and parts[2] == VALUE:
                values.setdefault(parts[0], {})[parts[1]] = name
                continue
            if parts and parts[1] in gone:
                raise CorruptError(
                    f"{raw.info(name).shard}: tensor '{name}' is of an expert that config.json calls constant", RESTORE
                )
            if parts:
                new = f"{parts[0]}.{parts[1] - sum(e < parts[1] for e in gone)}.{parts[2]}"
            self._infos[new], self._names[new] = replace(raw.info(name), name=new), (name,)
        for experts, found in values.items():
            self._join(experts, found)
        for shard in raw.shards():
            mine = tuple(info for info in self._infos.values() if info.shard == shard)
            self._headers[shard] = Header(mine, raw.header(shard).metadata, raw.header(shard).data_start, raw.header(shard).size)

    def _join(self, experts: str, found: Mapping[int, str]) -> None:
        wanted = self.constants.get(layer_number(experts), ())
        odd = sorted(set(wanted) ^ set(found))
        if odd:
            what = (
                "has no constant" if odd[0] in wanted else f"has a constant, and config.json does not list it in '{CONFIG_KEY}'"
            )
            raise CorruptError(f"expert {odd[0]} of '{experts}' {what}", RESTORE)
        rows = [self.raw.info(found[e]) for e in wanted]
        if len({(row.shape, row.dtype) for row in rows}) != 1 or len(rows[0].shape) != 1:
            raise CorruptError(f"{rows[0].shard}: the constants of '{experts}' are not vectors of one length and type", RESTORE)
        name, size = f"{experts}.{VALUE}", sum(row.bytes for row in rows)
        self._infos[name] = TensorInfo(
            name, rows[0].dtype, (len(rows), *rows[0].shape), rows[0].shard, rows[0].begin, rows[0].begin + size
        )
        self._names[name] = tuple(row.name for row in rows)

    @property
    def bytes(self) -> int:
        return self.raw.bytes

    def tensor(self, name: str) -> Tensor:
        self.info(name)
        parts = [self.raw.tensor(part) for part in self._names[name]]
        return torch.stack(parts) if name.endswith(VALUE) else parts[0]

    def stored(self, info: TensorInfo) -> Tensor:
        return self.tensor(info.name)

    def header_bytes(self, shard: str) -> Bytes:
        return self.raw.header_bytes(shard)


def substitute(model: nn.Module, constants: Mapping[int, tuple[int, ...]]) -> None:
    """Make the experts modules of an empty model as small as the folder's, with `approx_value` [C, d], and take constants apart.

    CorruptError where config.json lists experts of a layer that has none, or all that there are.
    """
    left = dict(constants)
    for name, module in list(model.named_modules()):
        sizes = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
        ids = left.get(layer_number(name)) if len(sizes) == 1 and name.endswith("experts") else None
        if ids is None:
            continue
        (experts,) = sizes
        if ids[-1] >= experts or len(ids) == experts:
            raise CorruptError(f"'{CONFIG_KEY}' of config.json lists {len(ids)} of the {experts} experts of '{name}'", RESTORE)
        del left[layer_number(name)]
        _shrink(module, experts, experts - len(ids))
        kept = [e for e in range(experts) if e not in set(ids)]
        module.router_rows = torch.tensor([*kept, *ids])
        route_constants(module, kept, ids, len(kept), partial(getattr, module, VALUE))
    if left:
        raise CorruptError(
            f"'{CONFIG_KEY}' of config.json lists experts of layer {min(left)}, which has none that can be", RESTORE
        )


def _shrink(module: nn.Module, experts: int, kept: int) -> None:
    hidden = module.down_proj.shape[2 if getattr(module, "is_transposed", False) else 1]  # type: ignore[index]
    first = next(module.parameters(recurse=False))
    for name, tensor in list(module.named_parameters(recurse=False)):
        if tensor.shape[0] == experts:
            setattr(module, name, nn.Parameter(tensor.new_empty(kept, *tensor.shape[1:]), requires_grad=False))
    module.num_experts = kept  # type: ignore[assignment]
    module.register_buffer(VALUE, first.new_empty(experts - kept, hidden))  # type: ignore[arg-type]


def route_constants(
    module: nn.Module, kept: Sequence[int], constant: Sequence[int], first: int, vectors: Callable[[], Tensor]
) -> list[RemovableHandle]:
    """Call a module of experts with the ids of those it holds, and add routing weight x vector of the others to its output.

    kept, constant: ids of the router. A kept expert has its place in `kept` as id where the module holds no others, else (`first` experts
    are there) its own; a constant one has first + its row of `vectors()` [C, d], which the module's own forward never sees: it gets expert
    0 with weight 0 instead. The sum is in float32, choice by choice: a token's does not depend on its batch.
    """
    places = torch.zeros(len(kept) + len(constant), dtype=torch.long)
    places[list(kept)] = torch.arange(len(kept)) if first == len(kept) else torch.tensor(kept)
    places[list(constant)] = first + torch.arange(len(constant))
    added: list[Tensor | None] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        call = dict(zip(CALL, args, strict=False)) | kwargs
        x, index, weight = (call[name] for name in CALL)
        there = (index >= 0) & (index < len(places))
        ids = torch.where(there, places.to(index.device)[index.clamp(0, len(places) - 1).long()], -1)
        added.append(_sum(x.reshape(-1, x.shape[-1]), ids - first, weight, vectors()))
        if not any(name in module.__dict__ for name in ANY_ID):
            none = (ids < 0) | (ids >= first)
            ids, weight = ids.masked_fill(none, 0), weight.masked_fill(none, 0)
        new = (x, ids.to(index.dtype), weight)
        return new[: len(args)], kwargs | {name: value for name, value in zip(CALL, new, strict=True) if name in kwargs}

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        more = added.pop() if added else None
        return output if more is None or output is None else output + more.to(output.dtype).reshape(output.shape)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    ]


def _sum(x: Tensor, row: Tensor, weight: Tensor, vectors: Tensor) -> Tensor | None:
    """[T, d] float32: weight [T, k] x vectors[row], row [T, k] below 0 means none. None if there is nothing on a CPU."""
    here = row >= 0
    if not row.is_cuda and not here.any():
        return None
    weight, vectors = weight.float() * here, vectors.to(x.device, torch.float32)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for c in range(row.shape[1]):
        out += weight[:, c, None] * vectors[row[:, c].clamp(min=0)]
    return out


def refuse_to_write(source: Source) -> None:
    """UsageError where a command would write a model with constant experts again."""
    if isinstance(source, CompactSource):
        raise UsageError(
            f"experts of '{source.folder}' are constants already, which is done last",
            "give the model as it was before `prune --form constant`",
        )
