"""The one way through an MoE layer at an operating point: route, select slots, execute, compensate.

Everybody goes this way: a model in memory, one whose experts are on disk, vLLM. What differs is the executor. Shapes: T tokens, k experts
per token, N sub-experts per expert, E experts, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..model.base import is_expert
from ..model.scores import RouterScores
from ..point import SlotBits, Toll
from ..routing import Routed
from ..routing.base import merge_state
from .base import LayerParts, Rule, Scorer
from .bind import PointGroup, Step
from .coded import CodedLayer
from .compensate import Compensator, compensator
from .control import HeldRows, Past
from .counter import Counter
from .execute.base import Executor, Settled
from .execute.woven import Woven
from .host import Host
from .prices import AS_IT_IS, Prices, prices_of, with_bits
from .rules import rules
from .scorers import scorers
from .select import Mixed, Selection, Whole, joined, nothing

Candidates = Selection | Whole | Mixed


@dataclass
class ElasticLayer:
    """One layer: its parts, the executor of its blocks, scorers and rules made on first use, and its counter.

    on_kept: is told (index [T, k'], keep [T, k', N], None: everything) of every batch. adds: whether what comes beside kept blocks
    (compensation, experts that are no weights) is added here; of several workers with a part of every block each, one adds it.
    """

    parts: LayerParts
    elastic: Host
    executor: Executor
    counter: Counter = field(init=False)
    on_kept: Callable[[Tensor, Tensor | None], None] | None = None
    adds: bool = True
    woven: Woven | None = None  # computes tokens that have an adapter
    _scorers: dict[Any, Scorer] = field(default_factory=dict)
    _rules: dict[Any, Rule] = field(default_factory=dict)
    _coded: dict[Any, CodedLayer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._number = self.parts.layer.index
        self.reset_counter()

    @property
    def index(self) -> int:
        """Which MoE layer of the model this is."""
        return self._number

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The layer's output [T, d] for its input x [T, d] and the router's choice [T, k]."""
        elastic = self.elastic
        step: Step = elastic.step
        if self._number == 0:
            elastic.carried.clear()
        own_weights = step.is_plain
        unwatched = own_weights and self.on_kept is None and not (elastic.counting or elastic.always_split)
        if unwatched:
            again = step.bound.again.get((self._number, step.which)) if step.is_one else None
            out = None if again is None else again(*self.executor.widened(x, weight), index, step.past)
            if out is not None:
                return out if out.dtype is x.dtype else out.to(x.dtype)
        own = self.parts.layer.extra
        if elastic.counting and own is not None and any(own.parameters):  # the layer adds them, whatever the point
            self.counter.add_extra(index - self.parts.layer.num_experts, own.parameters)
        found = self.candidates(step, x, index, weight)
        if found is None:  # the model's own choice, whole: nothing of ours is in the way
            whole = self.executor.whole(x, index, weight) if own_weights and not self.elastic.always_split else None
            if whole is not None:
                self._remember(step, None, None)
                self._count(index, Settled(None), selects=False)
                return whole
            found = Whole(index, weight, self._valid(index), self.parts.n_sub)
        extra = False if isinstance(found, Whole) else self._compensated(step)
        done = self._at_once(found, extra) if own_weights else None
        if done is not None:
            out, keep = done
            assert isinstance(found, Selection)
            self._remember(step, found, self.compensator if extra else None)
            self._count(found.index, Settled(keep), selects=True)
        else:
            settled = self.executor.settle(found)
            settled.cutoff, settled.factors = found.cutoff, found.factors
            self._count(found.index, settled, selects=not isinstance(found, Whole))
            out = self._computed(x, found, settled, extra)
        added = found.added()
        if added is not None and self.adds:
            out = out + added
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def candidates(
        self, step: Step, x: Tensor, index: Tensor, weight: Tensor, *, state: dict[str, Tensor] | None = None
    ) -> Candidates | None:
        """The slots to choose from, after routing; None where every slot of the router's own choice is kept.

        state: what stages carry from layer to layer; None: that of the forward that runs. A guess of what another input would keep has
        its own, and holds no budget.
        """
        bound, which = step.bound, step.which
        guess = state is not None
        routed = self.routed(x, index, weight, self.elastic.carried if state is None else state)
        if guess:
            routed.past = None  # nothing is noted of a guess
        if isinstance(which, Tensor) and which.numel() != len(x):
            raise UsageError(f"{which.numel()} operating points for {len(x)} tokens", "give one per token of the flattened batch")
        if isinstance(which, int):
            number, local = bound.place[which]
            return self._of_group(step, number, local, routed, guess=guess)
        groups, locals_ = (table.to(which.device)[which.reshape(-1)] for table in bound.tables)
        if len(bound.groups) == 1:
            return self._of_group(step, 0, locals_, routed, guess=guess)
        return self._mixed(step, groups, locals_, routed, guess)

    def kept(self, step: Step, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """keep [T, k', N] of a batch at a step, without computing anything of it, or moving what stages carry on."""
        found = self.candidates(step, x, index, weight, state=dict(self.elastic.carried) if self.index else {})
        return (found or Whole(index, weight, self._valid(index), self.parts.n_sub)).keep()

    def _mixed(self, step: Step, groups: Tensor, locals_: Tensor, routed: Routed, guess: bool) -> Candidates | None:
        """A batch of several groups [T]: each is routed and selected alone, all are computed together."""
        parts: list[tuple[Tensor, Selection | Whole]] = []
        own_way = True  # whether nobody changes the router's choice or drops a slot
        on_cpu, kinds = groups.device.type == "cpu", step.bound.groups
        for number in torch.unique(groups).tolist() if on_cpu else range(len(kinds)):
            rows = torch.where(groups == number)[0] if on_cpu else groups == number  # a GPU is not asked how many there are
            if on_cpu and len(rows) == len(groups):
                return self._of_group(step, number, locals_, routed, guess=guess)
            part = routed.of(rows) if on_cpu else self._only(kinds[number], routed, rows)
            local = locals_[rows] if on_cpu else torch.where(rows, locals_, 0)
            found = self._of_group(step, number, local, part, rows=rows, guess=guess)
            own_way = own_way and found is None
            if on_cpu:
                merge_state(routed.state, rows, part.state, len(groups))
            parts.append((rows, found or Whole(part.index, part.weight, self._valid(part.index), self.parts.n_sub)))
        if own_way:
            return None
        return joined(parts, routed.index, routed.weight, self.parts.n_sub)

    @staticmethod
    def _only(group: PointGroup, routed: Routed, rows: Tensor) -> Routed:
        """The batch as a group on a GPU sees it: rows [T] marks its own. Where they look at each other, the rest have no experts."""
        if not group.depends_on_batch:
            return routed
        return replace(routed, index=routed.index.masked_fill(~rows[:, None], -1))

    def _of_group(
        self, step: Step, number: int, which: int | Tensor, routed: Routed, *, rows: Tensor | None = None, guess: bool
    ) -> Selection | Whole | None:
        """The candidates of tokens that are all of one group; None as `candidates` says. rows: which of the batch they are."""
        group, budget = step.bound.groups[number], step.budget
        after = routed
        if group.stages:
            marked = routed.index.masked_fill(~self._valid(routed.index), -1)
            start = replace(routed, index=marked)
            after = start
            for stage in group.stages:
                after = stage(after, which)
            after = routed if after is start else after
        full = group.is_full(self.index, which) if budget is None else _is_full(budget)
        if full and after is routed and not self.executor.always_selects(len(routed.x)):
            return None
        added = partial(self._added, group, after) if group.stages else nothing
        if full and not self.executor.always_selects(len(routed.x)):
            return Whole(
                after.index, after.weight, self._valid(after.index), self.parts.n_sub, added, after.cutoff, after.factors
            )
        rule = self.rule(group.rule, group.settings)
        scorer = self.scorer(group.scorer, group.bits) if rule.needs_norms else None
        own = group.budget(self.index, which) if budget is None else group.position(self.index, budget)
        held = None if full or guess or group.holding is None else self._held(step, number, len(routed.x), rows)
        experts = self.parts.layer.num_experts
        x, weight = self.executor.widened(after.x, after.weight)
        return Selection(
            x, after.index, weight, experts, self.parts.n_sub, rule, scorer, own, added, held, after.cutoff, after.factors
        )

    def _held(self, step: Step, number: int, tokens: int, rows: Tensor | None) -> HeldRows:
        """What the budgets of a group are held with. UsageError where the layer's rows are not those of the forward."""
        holding = step.bound.groups[number].holding
        assert holding is not None
        if step.past is None:
            return HeldRows(Past.unknown(tokens, number + 1), holding[self.index], self.index, number + 1)
        past = step.past
        rows = None if rows is None or rows.dtype == torch.bool else rows  # a mask is of a device: all rows are there
        whole = step.which.numel() if isinstance(step.which, Tensor) else tokens
        if past.rows.shape[1] != whole:
            raise UsageError(
                f"layer '{self.parts.layer.name}' has {whole} rows where the model was given {past.rows.shape[1]} tokens",
                "use a point with control 'none'",
            )
        return HeldRows(past, holding[self.index], self.index, number + 1, rows)

    def _added(self, group: PointGroup, routed: Routed) -> Tensor | None:
        """[T, d]: what the stages' own experts add, and note what that reads."""
        experts = group.extra
        if experts is None:
            return None
        if self.elastic.counting:
            self.counter.add_extra(routed.index - routed.first_extra, experts.parameters)
        return experts(routed.x, routed.index, routed.weight, routed.first_extra)

    def routed(self, x: Tensor, index: Tensor, weight: Tensor, state: dict[str, Tensor]) -> Routed:
        """The router's choice [T, k] for x [T, d], as routing stages see it. state: what they carry on."""
        return Routed(
            x, index, weight, self.index, self.parts.layer.num_experts,
            self.parts.layer.num_experts + len(self.parts.layer.extra or ()),
            scores=lambda: self.router_scores(x, index, weight), residual=lambda: self.elastic.residual(self.index, x),
            state=state, past=self._past(len(x)), attention=lambda: self.elastic.attended(len(x)),
        )  # fmt: skip

    def _past(self, tokens: int) -> Past | None:
        """What came before the rows of the forward, where a stage asks for it and these are all of them."""
        step: Step = self.elastic.step
        if step.past is None or "past" not in step.bound.needs or step.past.rows.shape[1] != tokens:
            return None
        return step.past

    @cached_property
    def router_scores(self) -> RouterScores:
        """The router's probabilities, for stages that ask for them."""
        return RouterScores(self.elastic.model, self.parts.layer)

    def _at_once(self, found: Candidates, extra: Tensor | bool) -> tuple[Tensor, Tensor] | None:
        """(output, keep) where one call does everything; None where the parts are called one after the other."""
        if not isinstance(found, Selection) or isinstance(extra, Tensor) or not self.adds:
            return None
        if found.cutoff is not None or found.factors is not None:
            return None
        return self.executor.at_once(found, self.compensator if extra else None)

    def _remember(self, step: Step, selection: Selection | None, extra: Compensator | None) -> None:
        """Have the next rows at a step's one point, which no stage routes, computed without asking all of this again."""
        if not (self.adds and step.is_one) or any(group.stages for group in step.bound.groups):
            return
        again = self.executor.again(selection, extra)
        if again is not None:
            step.bound.again[self._number, step.which] = again

    def _computed(self, x: Tensor, found: Candidates, settled: Settled, extra: Tensor | bool) -> Tensor:
        """Execute, and make up for what is dropped: of all tokens, of none, or of those marked [T]."""
        index, keep = found.index, settled.keep
        x, weight = self.executor.widened(x, found.weight)
        if extra is False:
            return self._executed(x, index, weight, settled)
        fix = self.compensator
        assert fix is not None
        if extra is True:
            out = self._executed(x, index, fix.weights(index, weight, keep), settled)
            return out + fix(x, index, weight, keep).to(out.dtype) if self.adds else out
        assert isinstance(extra, Tensor)
        scaled = torch.where(extra[:, None], fix.weights(index, weight, keep), weight)
        out = self._executed(x, index, scaled, settled)
        return out + fix(x, index, weight, keep | ~extra[:, None, None]).to(out.dtype) if self.adds else out

    def _executed(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        """Kept slots. Tokens whose experts compute otherwise go their own way; the rest is computed as if those were not there."""
        if settled.cutoff is None and settled.factors is None:
            return self._kept_slots(x, index, weight, settled)
        parts, keep = [], settled.keep
        if settled.cutoff is not None:
            mine = (settled.cutoff > 0)[:, None, None]
            out, skipped, unused = self.executor.run_above(x, index, weight, Settled(keep & mine, cutoff=settled.cutoff))
            if self.elastic.counting:
                self.counter.add_skipped(skipped, unused)
            parts, keep = [out], keep & ~mine
        if settled.factors is not None:
            mine = settled.factors.rows[:, None, None]
            parts.append(self.executor.run_scaled(x, index, weight, Settled(keep & mine, factors=settled.factors)))
            keep = keep & ~mine
        if not keep.is_cpu or bool(keep.any()):
            widths = None if settled.widths is None else settled.widths.masked_fill(~keep, 0)
            parts.append(self._kept_slots(x, index, weight, Settled(keep, widths=widths)))
        return sum(parts[1:], parts[0])

    def _kept_slots(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        """All of the neurons of kept slots."""
        step = self.elastic.step
        if not step.is_plain:
            if self.woven is None:
                raise UsageError("a token has an adapter, and none are loaded", "load it first")
            return self.woven.run(x, index, weight, settled, step.adapter)
        if settled.widths is None:
            return self.executor.run(x, index, weight, settled)
        bits = step.bound.bits
        return self.executor.run_at(self.coded(bits), x, index, weight, settled)

    def _compensated(self, step: Step) -> Tensor | bool:
        """Which tokens' dropped slots are made up for: all, none, or marks [T]."""
        if self.compensator is None:
            return False
        wanted = [group.compensate for group in step.bound.groups]
        if all(wanted) or not any(wanted):
            return wanted[0]
        if isinstance(step.which, int):
            return wanted[step.bound.place[step.which][0]]
        number = step.bound.tables[0].to(step.which.device)[step.which.reshape(-1)]
        return torch.tensor(wanted, device=number.device)[number]

    def _valid(self, index: Tensor) -> Tensor:
        return is_expert(index, self.parts.layer.num_experts)

    def _count(self, index: Tensor, settled: Settled, *, selects: bool) -> None:
        if self.elastic.counting:
            stored = self.elastic.step.bound.groups[0].stored  # a point that has it shares no batch
            same = None if stored is None else stored[self.index].same
            self.counter.add(index, settled.keep, selects=selects, low=settled.low, widths=settled.widths, same=same)
        if self.on_kept is not None:
            self.on_kept(index, settled.keep)

    def reset_counter(self, devices: int = 0) -> None:
        """devices: as of `Counter`."""
        self.counter = Counter(self.parts.layer.num_experts, self.parts.n_sub, devices=devices)

    @cached_property
    def compensator(self) -> Compensator | None:
        """What makes up for dropped slots, where the artefact has it."""
        return compensator(self.parts)

    def forget(self) -> None:
        """Make everything that reads the parts's tensors again at the next call: they have changed."""
        self.forget_scorers()
        self._rules.clear()
        self.__dict__.pop("compensator", None)
        self.executor = self.elastic.executor_of(self.parts)

    def forget_weights(self) -> None:
        """Everything that was prepared from the layer's weights, which leave or have come."""
        self.forget_scorers()
        self.__dict__.pop("compensator", None)
        self.parts.stored = self.parts.few = self.parts.whole = None

    def forget_scorers(self) -> None:
        """Make them, and what is encoded, again at the next call: they know the weights, which have changed."""
        self._scorers.clear()
        self._coded.clear()
        self.parts.ready = None
        self.executor.forget()

    def scorer(self, name: str, bits: SlotBits | None = None) -> Scorer:
        """bits: with gate neurons as they are read then."""
        key = (name, bits and (bits.widths, bits.group, bits.choosing))
        if key not in self._scorers:
            kind, parts = scorers.get(name), self.parts
            if bits is not None:
                coded = self.coded(bits)
                parts = coded.at(bits.choosing) if kind.reads_all else coded.choosing(bits.choosing)
            self._scorers[key] = kind(parts)
        return self._scorers[key]

    def rule(self, name: str, settings: SlotBits | Toll | None = None) -> Rule:
        """The rule of a name on this layer, made once; settings: what it is made with beside the layer."""
        if (name, settings) not in self._rules:
            kind: Any = rules.get(name)
            self._rules[name, settings] = kind(self.parts) if settings is None else kind(self.parts, settings)
        return self._rules[name, settings]

    def coded(self, bits: SlotBits) -> CodedLayer:
        """The layer's experts in planes, encoded when they are first asked for."""
        key = (bits.widths, bits.group)
        if key not in self._coded:
            self._coded[key] = self.executor.coded(bits) or CodedLayer(self.parts, bits)
        return self._coded[key]

    def prices(self, group: PointGroup) -> Prices:
        """What reading this layer's weights costs at points of a group. Where all of them are whole, their rule need not exist here."""
        selects = self.executor.always_selects() or not all(group.is_full(self.index, p) for p in range(len(group.budgets)))
        scorer = self.scorer(group.scorer) if selects and rules.get(group.rule).needs_norms else None
        extra = self.compensator if selects and group.compensate else None
        stored = AS_IT_IS if group.stored is None else group.stored[self.index]
        prices = prices_of(self.parts, scorer, extra, self.elastic.stored_bytes_per_weight, stored)
        if group.bits is not None:
            prices = with_bits(prices, self.parts, group.bits)
        low = self.executor.low_bytes
        return prices if low is None else prices.with_low(low)


def _is_full(budget: Tensor) -> bool:
    """Budgets on a GPU are never asked for: a graph may be replayed with others in their place."""
    return budget.is_cpu and bool((budget >= 1).all())
