"""What the norm before an MoE layer feeds: found by watching one pass, and proved by scaling it. No family is known by name.

A vector s [d] with a positive number per channel can stand between both sides: the norm's weight over s, the columns of everything that
reads it times s. That changes no output. Shapes: d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from .base import MoELayer
from .norms import is_norm

ADVICE = "use a method that does not scale the inputs of experts"
PROBE = 8  # tokens of the pass that is watched
_KNOWN = "_moe_prism_norm_readers"


class Names(NamedTuple):
    """norm: the module; offset: what it adds to its weight before it multiplies; readers: matrices [o, d] beside the experts' own."""

    norm: str
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class NormReaders:
    """Of one layer of a model whose weights are in memory."""

    model: nn.Module
    layer: MoELayer
    names: Names

    @property
    def beside(self) -> list[Tensor]:
        """The matrices [o, d] beside the experts' own."""
        return [self.model.get_parameter(name) for name in self.names.readers]

    @torch.no_grad()
    def scale(self, s: Tensor, *, experts: bool = True) -> None:
        """Divide the norm's output by s [d] and multiply what reads it, in place; experts: whether theirs are multiplied too."""
        norm, offset = self.model.get_submodule(self.names.norm), self.names.offset
        weight, bias = norm.weight, getattr(norm, "bias", None)
        assert isinstance(weight, Tensor)
        weight.copy_(unscaled(weight, s, offset))
        if isinstance(bias, Tensor):
            bias.copy_(unscaled(bias, s, 0.0))
        for matrix in (*self.beside, *(self._experts() if experts else ())):
            matrix.mul_(s.to(matrix))

    @contextmanager
    def scaled(self, s: Tensor, *, experts: bool = True) -> Iterator[None]:
        """`scale` for the length of a block; everything is as it was afterwards, to the bit."""
        norm = self.model.get_submodule(self.names.norm)
        changed = [*norm.parameters(recurse=False), *self.beside, *(self._experts() if experts else ())]
        saved = [tensor.detach().clone() for tensor in changed]
        try:
            self.scale(s, experts=experts)
            yield
        finally:
            with torch.no_grad():
                for tensor, before in zip(changed, saved, strict=True):
                    tensor.copy_(before)

    def _experts(self) -> list[Tensor]:
        return [w for w in (self.layer.gate, self.layer.up) if w is not None]


def unscaled(weight: Tensor, s: Tensor, offset: float) -> Tensor:
    """A norm's weight [d] whose output is divided by s [d]."""
    return ((weight.double() + offset) / s.to(weight.device) - offset).to(weight)


def norm_readers(model: nn.Module, layers: Sequence[MoELayer]) -> list[NormReaders]:
    """Of every layer, found once per model by one short pass. UsageError where the norm, or one of its readers, cannot be told."""
    dense = next((layer for layer in layers if layer.is_dense), None)
    if dense is not None:
        raise UsageError(f"'{dense.name}' is a dense MLP: no router reads what it reads", ADVICE)
    if _KNOWN not in model.__dict__:
        found: dict[int, Names] = {}
        handles = [_watch(model, layer, found) for layer in layers]
        try:
            with torch.no_grad():
                ids = torch.arange(PROBE, device=model.get_input_embeddings().weight.device)[None]  # type: ignore[operator]
                model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        missing = next((layer.name for layer in layers if layer.index not in found), None)
        if missing is not None:
            raise UsageError(f"the layer '{missing}' did not run", ADVICE)
        model.__dict__[_KNOWN] = found
    return [NormReaders(model, layer, model.__dict__[_KNOWN][layer.index]) for layer in layers]


def _watch(model: nn.Module, layer: MoELayer, found: dict[int, Names]) -> Any:
    """Have the decoder layer looked at right after it has run, while its weights are there."""
    decoder = model.get_submodule(layer.block_name.rpartition(".")[0])

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found[layer.index] = _Look(model, layer).names(module, args, kwargs)
        s = 2.0 ** torch.randint(-3, 4, (layer.hidden,), generator=torch.Generator().manual_seed(0)).float()
        with NormReaders(model, layer, found[layer.index]).scaled(s):
            after = module.forward(*args, **kwargs)  # past the hooks: they may take the weights away
        before, after = (out[0] if isinstance(out, tuple) else out for out in (output, after))
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max())):
            raise UsageError(f"what reads the norm before '{layer.name}' is not known to the last one", ADVICE)

    return decoder.register_forward_hook(look, with_kwargs=True, prepend=True)


class _Look:
    """A decoder layer that runs once more, with an eye on its norms and its products."""

    def __init__(self, model: nn.Module, layer: MoELayer) -> None:
        self.model, self.layer, self.block = model, layer, model.get_submodule(layer.block_name)
        owned = [parameter for owner in layer.owners for parameter in model.get_submodule(owner).parameters()]
        self.own = {id(parameter) for parameter in owned}
        self.norms: list[tuple[nn.Module, Tensor]] = []
        self.entered: list[Tensor] = []

    def names(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Names:
        products = _Products()
        norms = [module for module in decoder.modules() if is_norm(module, self.layer.hidden)]
        handles = [module.register_forward_hook(self._of_norm) for module in norms]
        handles.append(self.block.register_forward_pre_hook(self._of_block, with_kwargs=True))
        try:
            with products:
                decoder.forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if not self.entered:
            raise UsageError(f"the block of '{self.layer.name}' did not run", ADVICE)
        x = self.entered[-1]
        before = [norm for norm, out in self.norms if _same(out, x)]
        if len(before) != 1:
            raise UsageError(f"the norm before '{self.layer.name}' cannot be told", ADVICE)
        names = {id(p): name for name, p in self.model.named_parameters() if id(p) not in self.own}
        found = dict.fromkeys(names[id(w)] for read, w in products.seen if id(w) in names and _same(read, x))
        norm = next(name for name, module in self.model.named_modules() if module is before[0])
        return Names(norm, _offset(before[0], x), tuple(found))

    def _of_norm(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.norms.append((module, output))

    def _of_block(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered.append(args[0] if args else kwargs["hidden_states"])


class _Products(TorchFunctionMode):
    """Notes (input, weight) of every linear product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.seen.append((args[0], args[1] if len(args) > 1 else kwargs["weight"]))
        return func(*args, **(kwargs or {}))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other, however it is laid out and in whatever type."""
    return a.numel() == b.numel() and a.shape[-1] == b.shape[-1] and torch.equal(a.reshape(-1).float(), b.reshape(-1).float())


@torch.no_grad()
def _offset(norm: Any, x: Tensor) -> float:
    """What the norm adds to its weight: 1 in families that learn the difference to 1, else 0."""
    weight = norm.weight.detach().clone()
    try:
        norm.weight.zero_()
        out = norm(x)
    finally:
        norm.weight.copy_(weight)
    bias = getattr(norm, "bias", None)
    out = out - bias if isinstance(bias, Tensor) else out
    return 0.0 if float(out.abs().max()) < 1e-6 else 1.0
