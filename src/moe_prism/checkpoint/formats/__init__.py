"""How released checkpoints store quantized weights: one file per format, found by config.json's quantization_config."""

from ...registry import Registry
from .base import SourceFormat, StoredWeight
from .matrix import CodedMatrix

source_formats: Registry[type[SourceFormat]] = Registry(
    "source format",
    {
        "fp8": (
            "moe_prism.checkpoint.formats.fp8:Fp8",
            "8-bit floats with a scale per block of 128 x 128 (DeepSeek, Qwen) or per tensor",
        ),
        "mxfp4": (
            "moe_prism.checkpoint.formats.mxfp4:Mxfp4",
            "4-bit floats in groups of 32 with powers of two as scales (gpt-oss)",
        ),
        "compressed-tensors": (
            "moe_prism.checkpoint.formats.compressed:CompressedTensors",
            "what llm-compressor writes: int8, int4 in groups, FP8, NVFP4, MXFP4",
        ),
        "modelopt": ("moe_prism.checkpoint.formats.modelopt:ModelOpt", "what NVIDIA Model-Optimizer writes: NVFP4 and FP8"),
        "awq": ("moe_prism.checkpoint.formats.awq:Awq", "int4 in groups with zero points, packed along the outputs"),
        "gptq": ("moe_prism.checkpoint.formats.gptq:Gptq", "int4 or int8 in groups, packed along the inputs; without act-order"),
    },
)

__all__ = ["CodedMatrix", "SourceFormat", "StoredWeight", "source_formats"]
