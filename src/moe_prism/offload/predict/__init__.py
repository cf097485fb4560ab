"""Predictors of the experts a layer will need, one file each."""

from ...registry import Registry
from .base import Predictor, Seen, recall

__all__ = ["Predictor", "Seen", "predictors", "recall"]

predictors: Registry[type[Predictor]] = Registry(
    "predictor",
    {
        "gate": (
            "moe_prism.offload.predict.gate:CrossLayerGate",
            "the layer's router on the input one layer before (training-free)",
            "arXiv 2502.12224",
        ),
        "learned-gate": ("moe_prism.offload.predict.learned_gate:LearnedGate", "the same, fitted in closed form (ours)"),
        "dictionary": (
            "moe_prism.offload.predict.dictionary:Dictionary",
            "from the experts of the two layers before",
            "arXiv 2308.14352",
        ),
        "token": ("moe_prism.offload.predict.token_table:TokenTable", "from the token id"),
        "path": (
            "moe_prism.offload.predict.path:Path",
            "a small network of the last token ids, all layers at once",
            "arXiv 2410.17954",
        ),
        "frequency": ("moe_prism.offload.predict.frequency:Frequency", "the most used experts of the layer"),
    },
)
