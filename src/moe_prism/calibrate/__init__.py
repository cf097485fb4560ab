"""One streaming pass over calibration text; collectors are plug-ins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_use
from ..registry import Registry

if TYPE_CHECKING:
    from .base import Collector, RoutedBatch

__getattr__ = on_use(__name__, {"base": "Collector RoutedBatch"})

collectors: Registry[type[Collector]] = Registry(
    "collector",
    {
        "counts": ("moe_prism.calibrate.counts:ChoiceCounts", "tokens and routing weight per expert"),
        "tokens": ("moe_prism.calibrate.tokens:TokenReservoir", "a bounded uniform sample of each expert's inputs"),
        "outputs": ("moe_prism.calibrate.outputs:Outputs", "norms and peaks of each expert's outputs, for pruning"),
        "grams": (
            "moe_prism.calibrate.grams:Grams",
            "inner products of all experts' outputs for a sample of tokens, for output-error",
        ),
        "means": ("moe_prism.calibrate.means:Means", "mean output of each expert and the spread around it, for constant experts"),
        "neurons": (
            "moe_prism.calibrate.neurons:Neurons",
            "squares, sizes and peaks of each neuron's activations, for removing neurons",
        ),
        "gradients": (
            "moe_prism.calibrate.gradients:Gradients",
            "what the loss feels of each neuron, from a backward pass, for heapr and slim",
        ),
        "inputs": ("moe_prism.calibrate.inputs:Inputs", "squares of the channels that each expert reads, for sub-moe and stun"),
        "pairs": ("moe_prism.calibrate.pairs:Pairs", "experts chosen together and scored alike, for merging"),
        "confidence": ("moe_prism.calibrate.confidence:Confidence", "how sure the router is of each expert, for premoe"),
        "scores": ("moe_prism.calibrate.scores:Scores", "router probabilities over all tokens, for pruning"),
        "rotation": ("moe_prism.calibrate.rotation:Rotation", "how much the layer turns the residual stream, for quantmoe"),
    },
)

__all__ = ["Collector", "RoutedBatch", "collectors"]
