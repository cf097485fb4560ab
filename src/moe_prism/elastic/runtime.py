"""Install elastic execution on a model, and choose the operating point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any

from torch import Tensor

from ..attention.watch import Attended, AttentionWatch, attention_watched
from ..calibrate.residual import watch_residual
from ..calibrate.run import backbone_of
from ..compress.changes import change_of
from ..compress.quantize.decoded import Encoded
from ..errors import UsageError
from ..model import MoELayer, find_layers
from ..model.router import TOP_K_NAMES
from ..partition.base import check_blocks
from ..point import FULL, OperatingPoint, WeightChange
from ..point.base import slots_unit
from .base import LayerParts
from .bind import Bound, Step, bind
from .execute.base import Executor, WholeCalls
from .execute.memory import InMemory
from .layer import ElasticLayer
from .observe import normalises
from .rules import rules
from .sequences import followed


class Elastic:
    """The elastic state of a model: `layers`, and the `step` that the next forward runs at.

    always_split sends even full budget down the split path. counting: whether the layers' counters run: they are for measuring costs,
    generation does not pay for them. carried: what routing stages carry from layer to layer of the forward that runs.
    """

    def __init__(self, model: Any, layer_parts: Sequence[LayerParts]) -> None:
        self.model = model
        self.always_split = self.counting = False
        self.carried: dict[str, Tensor] = {}
        self._normalises: bool | None = None
        # what a weight costs on the machine that serves; compute may use a wider type (float32 on a CPU)
        self.stored_bytes_per_weight: float = layer_parts[0].layer.up.element_size()
        self.woven, self.adapter = (
            False,
            -1,
        )  # whether adapters may be loaded, and whose experts steps have by default: `adapters.py`
        self._watching: dict[int, Any] = {}
        self._following = False
        self._heard = AttentionWatch()
        self._first = layer_parts[0].layer
        for parts in layer_parts:
            parts.check(None if model is None else self.k)
        self.layers = [ElasticLayer(parts, self, self.executor_of(parts)) for parts in layer_parts]
        self.full_step = self.step = Step(bind(self, [FULL]))
        for layer in self.layers:
            layer.parts.layer.install(layer)

    def executor_of(self, parts: LayerParts) -> Executor:
        """What computes a layer's blocks."""
        return InMemory(parts)

    def tally(self) -> WholeCalls:
        """How often slots were dropped, and how often whole experts were computed all the same, in all layers since they were attached."""
        own = [layer.executor.tally for layer in self.layers]
        return WholeCalls(sum(t.calls for t in own), sum(t.whole for t in own))

    def normalises(self) -> bool:
        """Whether the router scales the weights of its choice to a constant sum; asked of the model once, at full budget."""
        if self._normalises is None:
            with self.at(self.full_step, counting=False):
                self._normalises = normalises(self)
        return self._normalises

    def source_layers(self) -> Sequence[MoELayer]:
        """The layers with their experts as the checkpoint has them: shapes, where the weights are elsewhere."""
        return [layer.parts.layer for layer in self.layers]

    def check(self, point: OperatingPoint) -> None:
        """UsageError for a point that cannot run where this model's weights are; in memory every point can."""

    @property
    def k(self) -> int | None:
        """Experts per token, where the configuration names them."""
        try:
            return experts_per_token(self.model, self._first)
        except UsageError:
            return None

    @contextmanager
    def at(self, points: Bound | Step | Sequence[OperatingPoint], *, counting: bool | None = None) -> Iterator[Step]:
        """Run everything inside the block at these points, with whatever they need installed on the model, and taken off exactly.

        Of several points, `step.which` says which one each token runs at; a change of weights goes with one point alone.
        """
        step = points if isinstance(points, Step) else Step(points if isinstance(points, Bound) else bind(self, points))
        if self.adapter >= 0 and step.is_plain:
            step = replace(step, adapter=self.adapter)
        before, counted = self.step, self.counting
        with ExitStack() as stack:
            for point in step.bound.points:
                if point.weights is not None:
                    if len(step.bound.points) > 1:
                        raise UsageError("points that change the weights cannot share a batch", "run them one after the other")
                    self._enter_change(stack, point.weights)
            if "residual" in step.bound.needs:
                stack.enter_context(self._watched())
            if "attention" in step.bound.needs:
                stack.enter_context(self._attending())
            if step.bound.follows and step.past is None:
                stack.enter_context(self._followed())
            self.step, self.counting = step, counted if counting is None else counting
            try:
                yield step
            finally:
                self.step, self.counting = before, counted

    def _enter_change(self, stack: ExitStack, part: WeightChange) -> None:
        """Run under a change of weights until the stack unwinds. What was prepared from other weights is forgotten on both ways."""
        change = change_of(part)
        if change.touches_weights:
            stack.callback(self._forget_scorers)
        entered = stack.enter_context(change.installed(self.model, [layer.parts.layer for layer in self.layers]))
        if isinstance(entered, Encoded):
            for layer, parts in zip(self.layers, entered.layers, strict=True):
                layer.executor.take(entered.codec, parts)
                stack.callback(layer.executor.take, None, ())
        if change.touches_weights:
            self._forget_scorers()

    def _forget_scorers(self) -> None:
        for layer in self.layers:
            layer.forget_scorers()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """AttentionWatch the residual stream of every layer."""
        before = self._watching
        with ExitStack() as stack:
            layers = [layer.parts.layer for layer in self.layers]
            self._watching = {layer.index: stack.enter_context(watch_residual(self.model, layer)) for layer in layers}
            try:
                yield
            finally:
                self._watching = before

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Hear what attention is asked."""
        before = self._heard
        with attention_watched(self.model) as self._heard:
            try:
                yield
            finally:
                self._heard = before

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Follow the requests of every forward, once however deep the blocks nest."""
        if self._following:
            yield
            return
        self._following = True
        try:
            with followed(self, backbone_of(self.model)):
                yield
        finally:
            self._following = False

    def residual(self, layer: int, x: Tensor) -> Tensor:
        """The residual stream [T, d] of a layer's input x [T, d]. UsageError where it cannot be seen."""
        found = self._watching[layer](x) if layer in self._watching else None
        if found is None:
            name = self.layers[layer].parts.layer.name
            raise UsageError(f"the residual stream of '{name}' is not to be seen", "use a stage that does not ask for it")
        return found  # type: ignore[no-any-return]

    def attended(self, tokens: int) -> Attended:
        """What the attention before the layer that runs was asked, for so many tokens. UsageError where it cannot be seen."""
        return self._heard.of(tokens)

    def detach(self) -> None:
        """Give the model its own experts function back."""
        for layer in self.layers:
            layer.parts.layer.uninstall()
        self.model.__dict__.pop("_moe_prism", None)

    @contextmanager
    def count(self, devices: int = 0) -> Iterator[None]:
        """Count from zero what runs inside the block. The counters keep it afterwards. devices: that the experts of a layer are on, for
        what is sent; 0: each is on one of its own.
        """
        before, self.counting = self.counting, True
        for layer in self.layers:
            layer.reset_counter(devices)
        try:
            yield
        finally:
            self.counting = before


def attach(
    model: Any,
    n_sub: int,
    *,
    gates: int = 0,
    tensors: Sequence[dict[str, Tensor]] | None = None,
    layers: Sequence[MoELayer] | None = None,
) -> Elastic:
    """Make a model elastic. The neurons of each expert must already be in block order (a refactored checkpoint is).

    n_sub: sub-experts per expert; gates: gate neurons per sub-expert; tensors: side tensors per layer.
    Raises UsageError if a layer's width is not divisible by n_sub.
    """
    found = find_layers(model) if layers is None else layers
    for layer in found:
        if n_sub != 1:  # whole experts
            check_blocks(layer.width, n_sub, f"'{layer.name}'")
    layer_parts = [LayerParts(layer, n_sub, gates, dict(tensors[i]) if tensors else {}) for i, layer in enumerate(found)]
    model._moe_prism = Elastic(model, layer_parts)
    return model._moe_prism  # type: ignore[no-any-return]


def elastic_of(model: Any) -> Elastic:
    """The elastic state of a model. UsageError for one that has none."""
    elastic: Elastic | None = getattr(model, "_moe_prism", None)
    if elastic is None:
        raise UsageError(
            f"{type(model).__name__} is not elastic", "load it with moe_prism.load(folder written by `moe-prism refactor`)"
        )
    return elastic


@contextmanager
def operating_point(
    model: Any,
    budget: float | Tensor = 1.0,
    *,
    k: int | None = None,
    rule: str | None = None,
    point: OperatingPoint | Sequence[OperatingPoint] | None = None,
    which: int | Tensor = 0,
) -> Iterator[Elastic]:
    """Run everything inside the block at one operating point, or at one per token.

    budget: a share in (0, 1] of the bytes that a token reads (of its slots, for other rules than `threshold`), one number or a tensor [T]
    with one per token of the flattened batch. k: kept slots per token instead, 1..k*N. rule: None takes `threshold` for a budget, which is
    held for the mean of every request and spent on the tokens and layers that need it, and `product` for k, which is met by every token.
    point: everything at once, instead of the three; of several, which says which one runs, one number or a tensor [T] with one per token.
    Raises UsageError for a model that is not elastic, an unknown name, a number out of range, or a point for another model.

    >>> import moe_prism
    >>> model, tokenizer = moe_prism.load("elastic")
    >>> ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    >>> full = model(ids).logits
    >>> with moe_prism.operating_point(model, budget=0.5):
    ...     half = model(ids).logits
    >>> full.shape == half.shape, bool((full == half).all())
    (True, False)
    """
    elastic = elastic_of(model)
    if point is not None:
        if k is not None or rule is not None or isinstance(budget, Tensor) or budget != 1.0:
            raise UsageError("a point was given beside budget, k or rule", "say all of it in the point")
        points = [point] if isinstance(point, OperatingPoint) else list(point)
        step = Step(bind(elastic, points), which)
        step.bound.check_which(which)
    else:
        step = _step_of(elastic, budget, k, rule)
    with elastic.at(step):
        yield elastic


def _step_of(elastic: Elastic, budget: float | Tensor, k: int | None, rule: str | None) -> Step:
    rule = rule or ("threshold" if k is None else "product")
    rules.get(rule)
    if k is not None:
        slots = slots_per_token(elastic)
        if not isinstance(budget, Tensor) and budget != 1.0:
            raise UsageError(f"both budget {budget:g} and k {k} were given", "give one of them")
        if not 1 <= k <= slots or k != int(k):
            raise UsageError(f"k {k} is outside 1..{slots}", f"give a whole number: a token has {slots} slots")
        budget = k / slots
    if not isinstance(budget, Tensor | Real):
        raise UsageError(
            f"a budget is a number or a tensor, not {type(budget).__name__}", "torch.tensor([...]) has one per token"
        )
    low, high = (budget.min(), budget.max()) if isinstance(budget, Tensor) else (budget, budget)
    if not (low > 0 and high <= 1):
        raise UsageError(f"budget {float(low):g} is outside (0, 1]", "1 keeps every slot, 0.5 half of them")
    # with one budget per token the number in the point stands for "less than everything"
    number = 0.5 if isinstance(budget, Tensor) else float(budget)
    point = FULL.with_budget(number, rule)
    if k is not None:
        point = replace(point, slots=replace(point.slots, of=slots_unit(rule)))
    bound = bind(elastic, [point])
    for dial in bound.groups[0].dials[:1]:
        dial.at(float(low))  # of many budgets the smallest one says whether they can be
    return Step(bound, 0, budget if isinstance(budget, Tensor) else None)


def slots_per_token(elastic: Elastic) -> int:
    """k*N, read from the model's configuration; 1*N for a dense model."""
    parts = elastic.layers[0].parts
    return experts_per_token(elastic.model, parts.layer) * parts.n_sub


def experts_per_token(model: Any, layer: MoELayer) -> int:
    """k of the router, as the configuration, the block or the layer names it."""
    if layer.is_dense:
        return 1
    config = getattr(layer.module, "config", model.config)
    owners = config, model.config.get_text_config(decoder=True), model.get_submodule(layer.block_name), layer
    for value in (getattr(owner, name, None) for owner in owners for name in TOP_K_NAMES):
        if isinstance(value, int) and value > 0:
            return value
    raise UsageError(f"cannot tell how many experts '{layer.name}' uses per token", "give a budget instead of k")
