"""Cut experts into sub-experts, and choose each sub-expert's gate neurons.

Import `solve_layer` and `weight_fallback` from `.parallel` and `.weights`: they load a compiler, this list does not.
"""

from __future__ import annotations

from ..registry import Registry
from .base import Partition, Solver, cost, cost_share
from .gates import GateChoice, order_gates
from .objectives import Objective
from .output_space import Refiner

solvers: Registry[Solver] = Registry(
    "solver",
    {
        "alt": ("moe_prism.partition.alt:solve", "alternating balanced assignment, exact swaps, small restarts (default)"),
        "nested": ("moe_prism.partition.nested:solve", "as alt, but charging every number of dropped sub-experts, not one"),
        "sa": ("moe_prism.partition.sa:solve", "simulated annealing as in the paper, 100,000 swaps", "arXiv 2510.19366"),
        "greedy": ("moe_prism.partition.greedy:solve", "heavy neurons first, to the lightest sub-expert", "arXiv 2510.19366"),
        "contiguous": ("moe_prism.partition.contiguous:solve", "neurons stay where they are"),
        "random": ("moe_prism.partition.random_:solve", "a random balanced partition, the floor"),
    },
)

gates: Registry[GateChoice] = Registry(
    "gate_choice",
    {
        "energy": ("moe_prism.partition.gates:energy", "neurons that add most to the output (default)"),
        "centrality": (
            "moe_prism.partition.gates:centrality",
            "neurons most often active with their neighbours, ranked inside the sub-expert, as in the paper's code",
            "arXiv 2510.19366",
        ),
        "centrality-expert": (
            "moe_prism.partition.gates:centrality_expert",
            "the same, ranked over the whole expert, as in the paper's text",
            "arXiv 2510.19366",
        ),
    },
)

objectives: Registry[Objective] = Registry(
    "objective",
    {
        "paper": ("moe_prism.partition.objectives:paper", "|activations|, as in the paper (default)", "arXiv 2510.19366"),
        "output": ("moe_prism.partition.objectives:output", "activations times the norm of their down-projection column"),
        "router": ("moe_prism.partition.objectives:router", "tokens weighted by their routing weight"),
        "output-router": ("moe_prism.partition.objectives:output_router", "both"),
        "output-space": (
            "moe_prism.partition.objectives:output_router",
            "both, then swaps that lower the squared norm of the sum of what is dropped",
        ),
    },
)

refiners: Registry[Refiner] = Registry(
    "refiner",
    {"output-space": ("moe_prism.partition.output_space:refine", "swaps priced with the Gram matrix of W_down")},
)
"""What an objective of the same name does to a solver's result, with more than the mass to go by."""

__all__ = [
    "GateChoice",
    "Objective",
    "Partition",
    "Refiner",
    "Solver",
    "cost",
    "cost_share",
    "gates",
    "objectives",
    "order_gates",
    "refiners",
    "solvers",
]
