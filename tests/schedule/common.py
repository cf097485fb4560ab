"""A ladder like prism-nano's, a stated cost model, and shorthands."""

from moe_prism.forecast.step_cost import Coefficients
from moe_prism.point import FULL
from moe_prism.schedule import CostModel, Job, Ladder, LayerFacts, Level, Limits, Policy, Progress, policies
from moe_prism.schedule.fill import ceiling

POINTS = ((3.0, 0.85), (5.0, 0.9), (8.0, 0.94), (10.0, 0.965), (16.0, 1.0))
LADDER = Ladder(tuple(Level(f"k{k:g}", FULL.with_budget(k / 16), k, quality) for k, quality in POINTS))
FACTS = LayerFacts(experts=32, parts=4, chosen=4)


def cost(slope: float = 0.5, step: float = 5e-3, block: float = 0.0) -> CostModel:
    """1 ms per decode token and 0.25 ms per prompt token at the full model; a quarter of the slots takes `slope` of that."""
    share = (1 - slope) / 0.75
    fixed, slot = 1 - share, share / 16
    return CostModel(FACTS, Coefficients(step, 25e-5 * fixed, 1e-3 * fixed, 25e-5 * slot, 1e-3 * slot, 1e-9, 1e-7, block))


def policy(name: str, model: CostModel | None = None, **options) -> Policy:
    return policies.get(name)(LADDER, model or cost(), **options)


def waits(id: str, arrival: float = 0.0, prompt: int = 50, output: int = 20, **fields) -> Progress:
    return Progress(Job(id, arrival, prompt, output, **fields))


def runs(
    id: str, generated: int = 1, first: float = 0.0, arrival: float = 0.0, prompt: int = 50, output: int = 20, **fields
) -> Progress:
    return Progress(Job(id, arrival, prompt, output, **fields), prompt, generated, first, 0)


def check(works, waiting, running, limits: Limits) -> None:
    """What `base.Policy.step` promises."""
    known = {p.job.id: p for p in (*waiting, *running)}
    assert len({work.id for work in works}) == len(works), "a request twice"
    admitted = [p for p in waiting if p.job.id in {work.id for work in works}]
    assert len(running) + len(admitted) <= limits.requests or not admitted
    assert sum(p.job.prompt + p.job.output for p in admitted) <= limits.free_cache
    assert sum(work.tokens for work in works) <= limits.tokens
    for work in works:
        p = known[work.id]
        assert p.job.floor <= work.level <= ceiling(p.job, LADDER)
        assert 1 <= work.tokens <= max(p.remaining_prompt, 1)
