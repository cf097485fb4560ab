"""How experts are stored in fewer bits: one file per codec."""

from ...registry import Registry
from .base import Codec, Plane, Planes

codecs: Registry[type[Codec]] = Registry(
    "codec",
    {
        "rtn": ("moe_prism.compress.codec.rtn:Rtn", "whole numbers of 2 to 8 bits, a scale per group, with or without a zero"),
        "int8-rows": ("moe_prism.compress.codec.int8_rows:Int8Rows", "8 bits, a scale per row: the store's smaller records"),
        "fp8-block": ("moe_prism.compress.codec.floats:Fp8Block", "8-bit floats, a scale per 128 x 128 weights"),
        "mxfp4": ("moe_prism.compress.codec.floats:MicroFloat4", "4-bit floats in groups of 32 with powers of two as scales"),
        "nested": (
            "moe_prism.compress.codec.nested:Nested",
            "2 to 8 bits in one file: a base and one plane of signs per further bit (MWQ)",
            "arXiv 2504.15299",
        ),
        "binary": ("moe_prism.compress.codec.signs:Binary", "signs, and one size per group"),
        "ternary": (
            "moe_prism.compress.codec.signs:Ternary",
            "-1, 0, 1 times one size per group, five to a byte (MoTE)",
            "arXiv 2506.14435",
        ),
        "compeft": (
            "moe_prism.compress.codec.largest_signs:LargestSigns",
            "signs of the largest fifth and one size per matrix: for what fine-tuning changed (ComPEFT)",
            "arXiv 2311.13171",
        ),
        "low-rank-sparse": (
            "moe_prism.compress.codec.low_rank_sparse:LowRankSparse",
            "two thin matrices and the rows that they miss most (MC-SMoE)",
            "arXiv 2310.01334",
        ),
    },
)

__all__ = ["Codec", "Plane", "Planes", "codecs"]
