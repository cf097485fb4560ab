"""The same arrivals through the same policy in the simulator, with a cost model in the engine's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..schedule import CostModel, Ladder, policies
from ..schedule.simulate import SimulatedEngine, simulate
from ..schedule.workloads import Arrival
from .load import LoadRun
from .measures import measure
from .outcome import of_simulation
from .servers import PolicyChoice
from .workload import Workload

ATTAINED = 0.9
NEAR = 1.03  # how close the search for the capacity gets


@dataclass(frozen=True, kw_only=True)
class SimulatedServer:
    """What stands for a server: its policy, points and size, and what its steps really last. context: its limit of tokens."""

    policy: PolicyChoice
    cost: CostModel
    ladder: Ladder
    engine: SimulatedEngine
    context: int | None = None


def simulated(server: SimulatedServer, arrivals: Sequence[Arrival], seconds: float, patience: float) -> LoadRun:
    """A run as `drive` would give it, cut off after the same time."""
    cost, ladder = server.cost, server.ladder
    believed = CostModel(cost.facts, cost.coefficients)
    made = policies.get(server.policy.name)(ladder, believed, **server.policy.options)
    until = arrivals[-1].job.arrival + patience
    run = simulate(arrivals, made, cost, ladder, server.engine, until, believed=believed)
    return LoadRun(of_simulation(run.results, run.end), seconds)


def capacity(workload: Workload, server: SimulatedServer, seed: int = 0) -> float:
    """The highest rate at which 90 % of the requests meet their targets, by bisection; requests per second."""

    def good(rate: float) -> bool:
        arrivals = workload.arrivals(rate, seed, server.ladder, server.context)
        run = simulated(server, arrivals, workload.seconds, patience=30.0)
        return (measure(run.outcomes, run.window)["attainment"] or 0.0) >= ATTAINED

    low = high = 4 / workload.seconds + 0.5
    while good(high) and high < 1e4:
        low, high = high, high * 2
    while high / low > NEAR:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
