"""The router of an MoE layer: the one place that knows how a family's router is sliced or masked.

Nothing here knows a family by name. A router is the tensors beside the experts that have a row per expert, the attributes that hold the
number of experts, and the groups. Slicing them runs the family's own code on fewer experts, which is what removal does; that nothing was
overlooked is proved at run time: the same rows in another order must give the same routing (`Router.check`).

Shapes: T tokens, d hidden, E experts, M kept experts, k experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from .base import MoELayer

COUNT_NAMES = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts", "n_experts")
TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token", "moe_k", "top_k")
"""How configurations name the experts per token."""
GROUP_NAMES = ("num_group", "n_group", "num_groups", "num_expert_group", "num_expert_groups")
GROUP_LIMIT_NAMES = ("topk_group", "num_limited_groups", "topk_groups")
ADVICE = "this family's experts cannot be pruned yet"


@dataclass(frozen=True)
class RoutingGroups:
    """Group-limited routing: `count` groups of neighbouring experts, of which a token may use the best `limit`.

    least: the fewest experts a group can have for its score to be defined.
    """

    count: int
    limit: int
    least: int


@dataclass(frozen=True)
class _Row:
    """A tensor with one entry per expert along `dim`."""

    owner: nn.Module
    leaf: str
    dim: int
    path: str

    def get(self) -> Tensor:
        return getattr(self.owner, self.leaf)  # type: ignore[no-any-return]


class _Stopped(Exception):
    """Raised in a forward pass that is wanted only up to the experts."""


class Router:
    """What routes one layer. `rows`: its tensors with an entry per expert; `groups`: None unless routing is group-limited."""

    def __init__(self, model: nn.Module, layer: MoELayer) -> None:
        self.layer = layer
        self.name = layer.block_name
        self.block = model.get_submodule(self.name)
        self.experts = layer.num_experts
        self.roots = [m for n, m in self.block.named_children() if m is not layer.module and _routes(n, m)]
        self.rows = [*self._rows()]
        self.groups = self._groups()

    def refusal(self) -> str | None:
        """Why this router cannot be sliced, as far as its structure tells; None if nothing is known."""
        if self.experts == 1:
            return f"'{self.layer.name}' is a dense MLP: it has no experts to prune"
        if extra := self.layer.extra:
            return f"the router of '{self.layer.name}' also chooses among {len(extra)} experts that hold no matrices"
        if not self.layer.calls_with_ids:
            return f"the experts of '{self.layer.name}' are not called with ids that could be translated"
        if not any(row.get().ndim == 2 for row in self.rows):
            return f"no router with a row per expert was found beside '{self.layer.name}'"
        return None

    @contextmanager
    def sliced(self, kept: Sequence[int], groups: RoutingGroups | None = None) -> Iterator[None]:
        """Route among `kept` only (ids [M], in the order the removed model would have them), with the family's own code.

        The experts keep their ids: what the router chooses is translated back. groups: other groups than the router's own.
        """
        ids = torch.tensor(list(kept), device=self.rows[0].get().device)
        with ExitStack() as stack:
            for row in self.rows:
                stack.enter_context(_swapped(row, row.get().index_select(row.dim, ids.to(row.get().device)).detach()))
            stack.enter_context(self._counts(len(ids), groups or self.groups))
            stack.enter_context(_before(self.layer.module, lambda index: _translate(index, ids)))
            yield

    @contextmanager
    def masked(self, kept: Sequence[int]) -> Iterator[None]:
        """Route among `kept` with every expert in its place: minus infinity as the logit of the others, before the family's own top-k.

        For groups that are left with unequal numbers of experts. A selection bias is minus infinity there too: a sigmoid of minus
        infinity is 0, which a positive bias would lift above an expert that is kept.
        """
        dead = torch.ones(self.experts, dtype=torch.bool, device=self.rows[0].get().device)
        dead[torch.tensor(list(kept), device=dead.device)] = False
        mode = _MaskLogits(dead)
        with ExitStack() as stack:
            for row in self.rows:
                if "correction" in row.leaf or row.leaf == "expert_bias":
                    shown = dead.reshape(row.get().shape).to(row.get().device)
                    stack.enter_context(_swapped(row, row.get().detach().masked_fill(shown, -torch.inf)))
            for root in self.roots:
                stack.enter_context(_under(root, mode))
            yield

    @contextmanager
    def watched(self) -> Iterator[Callable[[], Tensor | None]]:
        """Yields a function that gives the router's scores [T, E] of the last forward pass, as they left its first layer; None: unseen."""
        seen: list[Tensor] = []

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple | list) else (output,):
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (self.experts,):
                    seen.append(value.detach().reshape(-1, self.experts))
                    return

        def last() -> Tensor | None:
            first = seen[0] if seen else None
            seen.clear()
            return first

        handles = [m.register_forward_hook(note) for root in self.roots for m in root.modules()]
        try:
            yield last
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids [T, k], routing weights [T, k]) of inputs x [T, d] of the block. UsageError if it does not run alone."""
        found: list[tuple[Tensor, Tensor]] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_routing(args, kwargs))
            raise _Stopped

        handle = self.layer.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.block(x[None])
        except _Stopped:
            return found[0]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"the router of '{self.layer.name}' does not run alone: {line}", ADVICE) from error
        finally:
            handle.remove()
        raise UsageError(f"the router of '{self.layer.name}' does not call its experts", ADVICE)

    @torch.no_grad()
    def check(self) -> None:
        """Prove on random inputs that experts in another order are routed the same. UsageError if not: something was overlooked.

        Needs the weights of the block.
        """
        refusal = self.refusal()
        if refusal:
            raise UsageError(refusal, ADVICE)
        generator = torch.Generator().manual_seed(0)
        weight = next(row.get() for row in self.rows if row.get().ndim == 2)
        x = torch.randn(64, self.layer.hidden, generator=generator).to(weight.device, weight.dtype)
        order = self._shuffled(generator)
        before = self._dense(x)
        with self.sliced(order):
            after = self._dense(x)
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 5e-2
        same = (before - after).abs().amax(1) <= tolerance * before.abs().amax(1)  # near ties may fall either way
        if float(same.float().mean()) < 0.9:
            raise UsageError(f"the router of '{self.layer.name}' depends on the order of its experts in a way not known", ADVICE)

    def _dense(self, x: Tensor) -> Tensor:
        """Routing weights [T, E], 0 where an expert is not chosen."""
        index, weight = self.route(x)
        dense = torch.zeros(len(x), self.experts, dtype=torch.float32, device=weight.device)
        return dense.scatter_add_(1, index.long(), weight.float())

    def _shuffled(self, generator: torch.Generator) -> list[int]:
        """All experts in random order, those of a group together."""
        groups = self.groups.count if self.groups else 1
        rows = torch.arange(self.experts).reshape(groups, -1)
        rows = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in rows])
        return rows[torch.randperm(groups, generator=generator)].flatten().tolist()

    def _rows(self) -> Iterator[_Row]:
        own = [("", self.block, False), *((n, m, True) for n, m in self.block.named_children() if m in self.roots)]
        for prefix, module, deep in own:
            tensors = [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]
            for path, tensor in tensors:
                if tensor.is_floating_point() and self.experts in tensor.shape and tensor.ndim <= 2:
                    place, _, leaf = path.rpartition(".")
                    dim = list(tensor.shape).index(self.experts)
                    yield _Row(module.get_submodule(place), leaf, dim, f"{prefix}.{path}" if prefix else path)

    def _modules(self) -> Iterator[nn.Module]:
        yield self.block
        for root in self.roots:
            yield from root.modules()

    def _groups(self) -> RoutingGroups | None:
        for module in self._modules():
            count = next((getattr(module, n) for n in GROUP_NAMES if isinstance(getattr(module, n, None), int)), None)
            limit = next((getattr(module, n) for n in GROUP_LIMIT_NAMES if isinstance(getattr(module, n, None), int)), None)
            if count is None or limit is None or count <= 1 or getattr(module, "topk_method", "") == "greedy":
                continue
            pairs = any("correction" in row.leaf for row in self.rows)  # then a group's score is the sum of its two best
            return RoutingGroups(count, limit, 2 if pairs else 1)
        return None

    @contextmanager
    def _counts(self, experts: int, groups: RoutingGroups | None) -> Iterator[None]:
        """The numbers of experts and groups that the modules hold, replaced."""
        changed: list[tuple[nn.Module, str, Any]] = []
        wanted: list[tuple[tuple[str, ...], int, int]] = [(COUNT_NAMES, self.experts, experts)]
        if groups and self.groups:
            wanted.append((GROUP_NAMES, self.groups.count, groups.count))
            wanted.append((GROUP_LIMIT_NAMES, self.groups.limit, groups.limit))
        try:
            for module in self._modules():
                for names, old, new in wanted:
                    for name in names:
                        if name in module.__dict__ and module.__dict__[name] == old:
                            changed.append((module, name, old))
                            setattr(module, name, new)
            yield
        finally:
            for module, name, value in changed:
                setattr(module, name, value)


_checked: WeakSet[nn.Module] = WeakSet()  # blocks whose router was proved: mask mode is entered for every batch of a measurement


def find_routers(model: nn.Module, layers: Sequence[MoELayer]) -> list[Router]:
    """The router of every layer, checked. UsageError for a model without experts, or with routers in an unknown form."""
    routers = [Router(model, layer) for layer in layers]
    for router in routers:
        if router.block not in _checked:
            router.check()
            _checked.add(router.block)
    return routers


def _routes(name: str, module: nn.Module) -> bool:
    text = f"{name} {type(module).__name__}".lower()
    return re.search(r"router|gate\b|topk", text) is not None and "shared" not in name and "experts" not in name


def _routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    return index, kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[-1]


def _translate(index: Tensor, ids: Tensor) -> Tensor:
    """Ids of the removed model -> ids of this one; what is outside [0, M) means no expert and stays outside [0, E)."""
    ids = ids.to(index.device)
    good = (index >= 0) & (index < len(ids))
    return torch.where(good, ids[index.clamp(0, len(ids) - 1).long()].to(index.dtype), -1)


@contextmanager
def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the expert ids that a module of experts is called with."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "top_k_index" in kwargs:
            return args, {**kwargs, "top_k_index": change(kwargs["top_k_index"])}
        return (args[0], change(args[1]), *args[2:]), kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _swapped(row: _Row, tensor: Tensor) -> Iterator[None]:
    """Another tensor in the place of a parameter or buffer; the very object comes back."""
    place: dict[str, Any] = row.owner._parameters if row.leaf in row.owner._parameters else row.owner._buffers
    before = place[row.leaf]
    place[row.leaf] = nn.Parameter(tensor, requires_grad=False) if isinstance(before, nn.Parameter) else tensor
    try:
        yield
    finally:
        place[row.leaf] = before


class _MaskLogits(TorchFunctionMode):
    """Minus infinity in the last dimension of every linear layer that has one output per expert."""

    def __init__(self, dead: Tensor) -> None:
        super().__init__()
        self.dead = dead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == len(self.dead):
            return out.masked_fill(self.dead.to(out.device), -torch.inf)
        return out


@contextmanager
def _under(module: nn.Module, mode: _MaskLogits) -> Iterator[None]:
    """Run a module's forward under a torch function mode."""
    forward = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    module.forward = wrapped
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
