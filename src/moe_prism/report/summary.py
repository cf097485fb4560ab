"""What a frontier says, in numbers and whole sentences. Every claim is computed; a loss is reported like a win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ..frontier.pareto import distinct_points, largest_cliff
from ..frontier.record import Frontier, MeasuredPoint

KEPT = 0.9  # of what the full model gets right; a point that keeps less of a slice has lost something
KL_ZERO = 1e-6  # nats per token; below it float32 logits cannot tell two models apart


@dataclass(frozen=True)
class Duel:
    """A plain top-k or rounded point and the closest sub-expert point that reads no more expert bytes (None: there is none)."""

    plain: MeasuredPoint
    best: MeasuredPoint | None


def full_bytes(frontier: Frontier) -> float:
    """Expert bytes per token of the full model: the cheapest point that keeps every slot, else the dearest point there is."""
    full = [p.active_expert_bytes for p in frontier.points if p.budget >= 1]
    everything = [p.active_expert_bytes for p in frontier.every]
    return min(full) if full else max(everything, default=1.0) or 1.0


def series(rule: str) -> str:
    """How a curve is called: selection rules choose among sub-experts, other methods go by their own names."""
    return f"sub-experts, {rule}" if is_rule(rule) else rule


@cache
def is_rule(name: str) -> bool:
    """Whether a method chooses among sub-experts."""
    from ..elastic.rules import rules  # brings torch, which importing this package must not

    return name in rules.names()


def main_rule(frontier: Frontier) -> str:
    """The rule with the most points on the Pareto set; the first one measured decides a tie."""
    wins = Counter({p.rule: 0 for p in frontier.points})
    wins.update(p.rule for p in frontier.points if p.pareto)
    return wins.most_common(1)[0][0] if wins else ""


def main_points(frontier: Frontier) -> list[MeasuredPoint]:
    """The points of the main rule."""
    return [p for p in frontier.points if p.rule == main_rule(frontier)]


def plain_points(frontier: Frontier) -> list[MeasuredPoint]:
    """What plain top-k offers: its points, and the full model it starts from."""
    full = [p for p in main_points(frontier) if p.budget >= 1]
    return [*frontier.baseline_topk, *full[:1]]


def duels(frontier: Frontier, standing: Sequence[MeasuredPoint] | None = None) -> list[Duel]:
    """Every plain top-k point, or each of `standing`, dearest first, against the sub-expert points."""
    rows = frontier.baseline_topk if standing is None else standing
    ordered = sorted(rows, key=lambda p: -p.active_expert_bytes)
    return [Duel(plain, _closest_within(frontier.points, plain.active_expert_bytes)) for plain in ordered]


def _closest_within(points: Sequence[MeasuredPoint], cost: float) -> MeasuredPoint | None:
    affordable = [p for p in points if p.active_expert_bytes <= cost * (1 + 1e-9)]
    return min(affordable, key=lambda p: p.kl, default=None)


def sentences(frontier: Frontier) -> list[str]:
    """The plain-language summary of a frontier that has points."""
    told = (_range, _halfway, _score, _bits, _steps, _quality, judgement, _speed)
    return [sentence for tell in told if (sentence := tell(frontier))]


def _range(frontier: Frontier) -> str:
    full = full_bytes(frontier)
    shares = [p.active_expert_bytes / full for p in frontier.points]
    kept = sum(p.pareto for p in frontier.points)
    cut = f", with every expert cut into {frontier.n_sub} sub-experts," if frontier.n_sub > 1 else ""
    return (
        f"{frontier.model}{cut} was measured at {len(shares)} operating "
        f"points between {percent(min(shares))} and {percent(max(shares))} of the expert weights per token; "
        f"{kept} of them {'is' if kept == 1 else 'are'} not beaten by any other point."
    )


def _halfway(frontier: Frontier) -> str:
    full = full_bytes(frontier)
    found = [d for d in duels(frontier) if d.best]
    if not found:
        return ""
    duel = min(found, key=lambda d: abs(d.plain.active_expert_bytes / full - 0.5))
    share = duel.plain.active_expert_bytes / full
    best = duel.best
    assert best is not None
    where = "half the expert bytes" if abs(share - 0.5) < 0.01 else f"{percent(share)} of the expert bytes"
    return f"At {where} KL is {kl(best.kl)}, plain {duel.plain.name} costs {kl(duel.plain.kl)}."


def _score(frontier: Frontier) -> str:
    found = duels(frontier)
    wins = sum(d.best is not None and d.best.kl < d.plain.kl for d in found)
    if not found:
        return ""
    who = "Sub-experts" if all(is_rule(p.rule) for p in frontier.points) else "A measured method"
    verb = "are" if who == "Sub-experts" else "is"
    return f"{who} {verb} closer to the full model than plain top-k at {wins} of {len(found)} plain top-k prices."


def _bits(frontier: Frontier) -> str:
    """What rounding the whole model gives at the same price: no row of a frontier is good that loses to it."""
    full, told = full_bytes(frontier), []
    for row, best in ((d.plain, d.best) for d in duels(frontier, frontier.baseline_bits)):
        beside = f", the closest point at that price {kl(best.kl)}" if best else ", and no point reads as little"
        told.append(f"{row.name} alone reads {percent(row.active_expert_bytes / full)} of the bytes at KL {kl(row.kl)}{beside}")
    return f"{'; '.join(told)}." if told else ""


def _steps(frontier: Frontier) -> str:
    main, plain = main_points(frontier), plain_points(frontier)
    if len(plain) < 2 or len(main) < 2:
        return ""
    return (
        f"The largest quality step between two neighbouring prices is {percent(cliff(main))} of the KL range "
        f"({distinct(main)} distinct points); with plain top-k it is {percent(cliff(plain))} ({distinct(plain)})."
    )


def _quality(frontier: Frontier) -> str:
    ordered = sorted(frontier.points, key=lambda p: p.active_expert_bytes)
    low, high = ordered[0], ordered[-1]
    return (
        f"Perplexity goes from {perplexity(high.ppl)} at the highest price to {perplexity(low.ppl)} at the lowest, where the "
        f"most likely next token is still the source model's for {percent(low.top1_agreement)} of the tokens."
    )


def judged_points(frontier: Frontier) -> list[MeasuredPoint]:
    """The points that were asked slices."""
    return [p for p in frontier.every if p.slices]


def slice_names(frontier: Frontier) -> list[str]:
    """Of the judge, in the order in which they were asked; none where there was no judge."""
    return list(dict.fromkeys(name for point in frontier.every for name in point.slices))


def judgement(frontier: Frontier) -> str:
    """Which points keep less than 90 % of their worst slice, and the one of them that perplexity shows least."""
    judged = judged_points(frontier)
    failing = [(p, name) for p in judged if (name := p.worst_slice) and p.slices[name].kept < KEPT]
    if not judged:
        return ""
    if not failing:
        return f"Every point keeps at least {percent(KEPT)} of what the full model gets right in each slice of the text."
    full = next((p.ppl for p in judged if p.budget >= 1 and p.kl < KL_ZERO), min(p.ppl for p in judged))
    point, name = min(failing, key=lambda found: abs(found[0].ppl / full - 1))
    change = 100 * (point.ppl / full - 1)
    return (
        f"{len(failing)} of {len(judged)} points keep less than {percent(KEPT)} of what the full model gets right in their worst "
        f"slice; of them {point.name} changes perplexity least, by {change:+.1f}\u00a0%, and keeps {percent(point.slices[name].kept)} "
        f"of the slice '{name}'."
    )


def is_timed(frontier: Frontier) -> bool:
    """Whether the time of any point was measured."""
    return any(p.time for p in frontier.every)


def _speed(frontier: Frontier) -> str:
    full, stock = full_bytes(frontier), frontier.provenance.get("time", {}).get("stock", {})
    timed = [p for p in main_points(frontier) if p.time and p.budget < 1]
    if not timed or "ms_per_token" not in stock:
        return ""
    half = min(timed, key=lambda p: abs(p.active_expert_bytes / full - 0.5))
    plain = [p for p in frontier.baseline_topk if p.time]
    nearest = min(plain, key=lambda p: abs(p.active_expert_bytes - half.active_expert_bytes), default=None)
    assert half.time is not None
    beside = f", plain {nearest.name} {nearest.time.of_stock:.2f}" if nearest and nearest.time else ""
    return (
        f"Decoding took {stock['ms_per_token']:.3g} ms per token with the full stock model on the machine of this measurement; "
        f"{half.name} took {half.time.of_stock:.2f} times as long{beside}."
    )


def cliff(points: Sequence[MeasuredPoint]) -> float:
    """Largest KL step between cost-neighbours, share of the KL range."""
    return largest_cliff([p.active_expert_bytes for p in points], [p.kl for p in points])


def distinct(points: Sequence[MeasuredPoint]) -> int:
    """How many of the points are real choices: not dominated and at least 2 % apart in cost."""
    return len(distinct_points([p.active_expert_bytes for p in points], [p.kl for p in points]))


def percent(share: float) -> str:
    """0.5 -> "50 %", 0.9341 -> "93.4 %"."""
    return f"{100 * share:.1f}".removesuffix(".0") + "\u00a0%"


def kl(value: float) -> str:
    """KL in nats to what can be told apart."""
    if abs(value) < KL_ZERO:
        return "0"
    return f"{value:.4f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def perplexity(value: float) -> str:
    """Four digits or so, never an exponent below a million."""
    return f"{value:.3f}" if value < 100 else f"{value:.1f}" if value < 1e6 else f"{value:.2e}"
