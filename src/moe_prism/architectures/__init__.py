"""Architectures that `moe-prism train` builds: how many experts run, how they are chosen, and what training adds to the loss.

Importing `moe_prism.architectures.own` makes transformers know the ones that are ours, so that it loads their checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use
from ..registry import Registry

if TYPE_CHECKING:
    from .base import Architecture, LayerRouting, StepPlace, StepSeen, TrainingPart

__getattr__ = on_use(__name__, {"base": "Architecture TrainingPart StepPlace LayerRouting StepSeen"})

__all__ = ["Architecture", "LayerRouting", "StepPlace", "StepSeen", "TrainingPart", "architectures"]

architectures: Registry[type[Architecture]] = Registry(
    "architecture",
    {
        "top-k": ("moe_prism.architectures.top_k:TopK", "a learned router and a fixed k: what the others are compared with"),
        "smoe-dropout": (
            "moe_prism.architectures.smoe_dropout:SMoEDropout",
            "a router that is never trained, and a k that grows (SMoE-Dropout)",
            "arXiv 2303.01610",
        ),
        "elastic": (
            "moe_prism.architectures.elastic:ElasticTrained",
            "trained at a budget of sub-experts that is drawn per token",
        ),
        "dynamic-moe": (
            "moe_prism.architectures.dynamic_moe:DynamicMoE",
            "as many experts as reach a share of the probability, with an entropy loss (Dynamic-MoE)",
            "arXiv 2403.07652",
        ),
        "sigma-moe": (
            "moe_prism.architectures.sigma_moe:SigmaMoE",
            "one expert per token, and more in the lowest layers early in training (Sigma-MoE-Tiny)",
            "arXiv 2512.16248",
        ),
        "deepseek-moe": (
            "moe_prism.architectures.deepseek_moe:DeepSeekMoE",
            "narrow experts beside shared ones (DeepSeekMoE)",
            "arXiv 2401.06066",
        ),
        "sinkhorn": (
            "moe_prism.architectures.sinkhorn:Sinkhorn",
            "some steps route by an even transport plan, none has a balance loss (selective Sinkhorn)",
            "arXiv 2511.08972",
        ),
        "adamoe": (
            "moe_prism.architectures.adamoe:AdaMoE",
            "experts that do nothing beside the true ones, and a larger k (AdaMoE)",
            "arXiv 2406.13233",
        ),
        "moe-plus-plus": (
            "moe_prism.architectures.moe_plus_plus:MoEPlusPlus",
            "zero, copy and constant experts, and routers that see the last one's scores (MoE++)",
            "arXiv 2410.07348",
        ),
        "rmoe": (
            "moe_prism.architectures.rmoe:RMoE",
            "a recurrent state runs through the routers of all layers (RMoE)",
            "arXiv 2408.06793",
        ),
        "rexmoe": (
            "moe_prism.architectures.rexmoe:ReXMoE",
            "a router may choose experts of neighbouring layers (ReXMoE)",
            "arXiv 2510.17483",
        ),
        "chain-of-experts": (
            "moe_prism.architectures.chain_of_experts:ChainOfExperts",
            "several routed passes in one layer (Chain-of-Experts)",
            "arXiv 2506.18945",
        ),
        "mote": (
            "moe_prism.architectures.mote:MoTE",
            "experts of three values beside the frozen dense layer that they were copied from (MoTE)",
            "arXiv 2506.14435",
        ),
        "union-of-experts": (
            "moe_prism.architectures.union_of_experts:UnionOfExperts",
            "slices of one wide MLP, chosen for a text, or choosing tokens (UoE)",
            "arXiv 2503.02495",
        ),
        "graph-of-tokens": (
            "moe_prism.architectures.graph_of_tokens:GraphOfTokens",
            "a router that also hears what it said of like tokens (S-MoE, A-MoE)",
            "arXiv 2505.00792",
        ),
        "read-me": (
            "moe_prism.architectures.read_me:RouterAhead",
            "one router in front of the model says the experts of all layers (Read-ME)",
            "arXiv 2410.19123",
        ),
        "dit-moe": (
            "moe_prism.architectures.dit_moe:DiTMoE",
            "a transformer that draws digits, with shared and routed experts (DiT-MoE)",
            "arXiv 2407.11633",
        ),
    },
)
