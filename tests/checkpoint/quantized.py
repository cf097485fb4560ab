"""Checkpoints of every quantized form, written and read back by the definitions of the formats: numpy, element by element.

Nothing here shares code with the product, so that a mistake in one is not a mistake in both. Sources of the definitions: OCP MX 1.0
(E2M1, E8M0), OCP FP8 (E4M3), the kernels of AutoAWQ and AutoGPTQ, compressed-tensors' documentation, gpt-oss' reference weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
GROUP = 32


def e2m1(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, (byte >> 3) & 15, byte & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E2M1 = np.array([e2m1(c) for c in range(16)], np.float32)
E4M3 = np.array([e4m3(b) for b in range(256)], np.float32)


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    good = np.where(np.isfinite(grid) & (np.abs(grid) <= 448))[0]
    return good[np.abs(values[..., None] - grid[good]).argmin(-1)]


def groups(w: np.ndarray, width: int) -> np.ndarray:
    return w.reshape(*w.shape[:-1], -1, width)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def pack(codes: np.ndarray, bits: int = 4) -> torch.Tensor:
    """[..., n] -> int32 words, the first code in the lowest bits."""
    per = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per), np.uint32)
    for place in range(per):
        words |= codes[..., place::per].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32))


def word_code(words: torch.Tensor, row: int, column: int, place: int, bits: int = 4) -> int:
    return (int(words[row, column]) >> (bits * place)) & ((1 << bits) - 1)


Made = tuple[Tensors, np.ndarray]
"""Tensors beside a stem, and the weight they stand for."""


def fp8(w: np.ndarray, block: tuple[int, int] = (16, GROUP), scale: torch.dtype = torch.float32) -> Made:
    rows, columns = w.shape
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    codes, out = np.zeros(w.shape, np.uint8), np.zeros(w.shape, np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = float(torch.tensor(np.abs(w[at]).max() / 448).to(scale))
            codes[at] = nearest(w[at] / scales[i, j], E4M3)
            out[at] = E4M3[codes[at]] * scales[i, j]
    return {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale_inv": torch.from_numpy(scales).to(scale),
    }, out  # fmt: skip


def fp8_powers(w: np.ndarray) -> Made:
    return fp8(w, scale=torch.float8_e8m0fnu)


def fp8_tensor(w: np.ndarray) -> Made:
    made, out = fp8(w, w.shape)
    return {"weight": made["weight"], "weight_scale": made["weight_scale_inv"].reshape(()), "input_scale": torch.ones(())}, out


def mxfp4(w: np.ndarray) -> Made:
    """[E, o, i] -> gpt-oss' blocks and scales; the model's weight is [E, i, o]."""
    parts = groups(w, GROUP)
    exponents = np.floor(np.log2(np.abs(parts).max(-1) + 1e-30)) - 2
    codes = nearest(parts / 2.0 ** exponents[..., None], E2M1).astype(np.uint8)
    out = (E2M1[codes] * 2.0 ** exponents[..., None]).reshape(w.shape).astype(np.float32)
    blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
    return {"_blocks": torch.from_numpy(blocks), "_scales": torch.from_numpy((exponents + 127).astype(np.uint8))}, out.swapaxes(
        1, 2
    )


def ct_mxfp4(w: np.ndarray) -> Made:
    made, out = mxfp4(w[None])
    packed = made["_blocks"][0].reshape(len(w), -1)
    return {"weight_packed": packed, "weight_scale": made["_scales"][0]}, np.ascontiguousarray(out[0].T)


def int8_channel(w: np.ndarray) -> Made:
    scale = torch.from_numpy(np.abs(w).max(1, keepdims=True) / 127).bfloat16()
    codes = np.clip(np.rint(w / scale.float().numpy()), -128, 127).astype(np.int8)
    return {"weight": torch.from_numpy(codes), "weight_scale": scale}, codes * scale.float().numpy()


def fp8_channel(w: np.ndarray) -> Made:
    scale = torch.from_numpy(np.abs(w).max(1, keepdims=True) / 448).bfloat16()
    codes = nearest(w / scale.float().numpy(), E4M3).astype(np.uint8)
    return {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale": scale}, E4M3[
        codes
    ] * scale.float().numpy()


def ct_int4(w: np.ndarray) -> Made:
    parts = groups(w, GROUP)
    scale = torch.from_numpy(np.abs(parts).max(-1) / 7).bfloat16()
    s = scale.float().numpy()[..., None]
    codes = np.clip(np.rint(parts / s), -8, 7)
    return {
        "weight_packed": pack((codes + 8).reshape(w.shape).astype(np.uint8)), "weight_scale": scale,
        "weight_shape": torch.tensor(w.shape),
    }, (codes * s).reshape(w.shape).astype(np.float32)  # fmt: skip


def ct_int4_zeros(w: np.ndarray) -> Made:
    parts = groups(w, GROUP)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = torch.from_numpy((high - low) / 15).bfloat16()
    s = scale.float().numpy()
    zero = np.clip(np.rint(-8 - low / s), -8, 7)
    codes = np.clip(np.rint(parts / s[..., None]) + zero[..., None], -8, 7)
    out = (codes - zero[..., None]) * s[..., None]
    packed_zero = pack((zero + 8).T.astype(np.uint8)).T.contiguous()
    return {
        "weight_packed": pack((codes + 8).reshape(w.shape).astype(np.uint8)), "weight_scale": scale,
        "weight_zero_point": packed_zero, "weight_shape": torch.tensor(w.shape),
    }, out.reshape(w.shape).astype(np.float32)  # fmt: skip


def _fp4_16(w: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [o, i], FP8 scales as bytes, and what code x scale gives; `top`: the factor that brings scales into FP8's range."""
    parts = groups(w, 16)
    scales = nearest(np.abs(parts).max(-1) / 6 * top, E4M3).astype(np.uint8)
    s = (E4M3[scales] / top)[..., None].astype(np.float32)
    codes = nearest(parts / s, E2M1).astype(np.uint8)
    return codes.reshape(w.shape), scales, (E2M1[codes] * s).reshape(w.shape).astype(np.float32)


def nvfp4(w: np.ndarray) -> Made:
    top = float(np.float32(448 * 6 / np.abs(w).max()))
    codes, scales, out = _fp4_16(w, top)
    return {
        "weight_packed": torch.from_numpy(codes[:, ::2] | (codes[:, 1::2] << 4)),
        "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn), "weight_global_scale": torch.tensor([top]),
        "input_global_scale": torch.ones(1),
    }, out  # fmt: skip


def modelopt_nvfp4(w: np.ndarray) -> Made:
    second = float(np.float32(np.abs(w).max() / (448 * 6)))
    codes, scales, out = _fp4_16(w, 1 / second)
    return {
        "weight": torch.from_numpy(codes[:, ::2] | (codes[:, 1::2] << 4)),
        "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn), "weight_scale_2": torch.tensor(second),
        "input_scale": torch.ones(()),
    }, out  # fmt: skip


def _zeroed(w: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor, np.ndarray]:
    parts = groups(w, GROUP)
    low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    scale = torch.from_numpy((high - low) / top).half()
    s = scale.float().numpy()
    zero = np.clip(np.rint(-low / s), 0, top)
    codes = np.clip(np.rint(parts / s[..., None]) + zero[..., None], 0, top)
    out = ((codes - zero[..., None]) * s[..., None]).reshape(w.shape).astype(np.float32)
    return codes.reshape(w.shape).astype(np.uint8), zero.astype(np.uint8), scale, out


def awq(w: np.ndarray) -> Made:
    codes, zero, scale, out = _zeroed(w, 15)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # column of each place of a word

    def rows(x: np.ndarray) -> torch.Tensor:
        return pack(x.reshape(len(x), -1, 8)[..., order].reshape(len(x), -1))

    return {"qweight": rows(codes.T), "qzeros": rows(zero.T), "scales": scale.T.contiguous()}, out


def gptq(w: np.ndarray, bits: int = 4, less: int = 1) -> Made:
    codes, zero, scale, out = _zeroed(w, (1 << bits) - 1)
    zero = np.maximum(zero, less)  # version 1 cannot say 0
    s = scale.float().numpy()
    out = ((groups(codes, GROUP) - zero[..., None].astype(np.float32)) * s[..., None]).reshape(w.shape).astype(np.float32)
    return {
        "qweight": pack(codes, bits).T.contiguous(), "qzeros": pack((zero - less).T, bits).contiguous(),
        "scales": scale.T.contiguous(), "g_idx": torch.arange(w.shape[1], dtype=torch.int32) // GROUP,
    }, out  # fmt: skip


def ct(form: str, bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """Settings as llm-compressor writes them: what it names, transformers looks for."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    group = {"targets": ["Linear"], "format": form, "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }  # fmt: skip


FORMS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Made]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, GROUP], "activation_scheme": "dynamic"}, fp8),
    "fp8-powers": ({"quant_method": "fp8", "weight_block_size": [16, GROUP], "scale_fmt": "ue8m0"}, fp8_powers),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
    "ct-mxfp4": (ct("mxfp4-pack-quantized", 4, "float", "group", group_size=GROUP, scale_dtype="torch.uint8"), ct_mxfp4),
    "int8": (ct("int-quantized", 8, "int", "channel"), int8_channel),
    "fp8-channel": (ct("float-quantized", 8, "float", "channel"), fp8_channel),
    "int4": (ct("pack-quantized", 4, "int", "group", group_size=GROUP), ct_int4),
    "int4-zeros": (ct("pack-quantized", 4, "int", "group", group_size=GROUP, symmetric=False), ct_int4_zeros),
    "nvfp4": (ct("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"), nvfp4),
    "modelopt-nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt_nvfp4),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}, gptq),
    "gptq-8": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False}, lambda w: gptq(w, 8)),
    "gptq-v2": ({"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, less=0)),
}  # fmt: skip
"""Name -> quantization_config, and what makes the tensors of one weight [o, i]."""


def quantize(plain: Path, folder: Path, form: str, twin: Path | None = None) -> None:
    """`plain` with its experts and attention quantized to `folder`, and to `twin` with the weights it stands for, in float32."""
    settings, make = FORMS[form]
    config = json.loads((plain / "config.json").read_text())
    for target, extra in ((folder, {"quantization_config": settings}), (twin, {"dtype": "float32"})):
        if target:
            shutil.copytree(plain, target)
            (target / "config.json").write_text(json.dumps(config | extra))
    for file in sorted(plain.glob("*.safetensors")):
        stored: Tensors = {}
        meant: Tensors = {}
        for name, tensor in load_file(file).items():
            for stem, parts, value in _weights(name, tensor, form, make):
                stored |= {stem + end: t.contiguous() for end, t in parts.items()}
                meant[name] = torch.from_numpy(np.ascontiguousarray(value)) if value is not None else tensor.float()
        save_file(stored, folder / file.name, {"format": "pt"})
        if twin:
            save_file(meant, twin / file.name, {"format": "pt"})
    _index(folder)
    if twin:
        _index(twin)


def _weights(name: str, tensor: torch.Tensor, form: str, make: Any) -> Iterator[tuple[str, Tensors, np.ndarray | None]]:
    if form == "mxfp4" and tensor.ndim == 3:
        yield name, *make(tensor.float().numpy().swapaxes(1, 2))
    elif form != "mxfp4" and name.endswith("proj.weight"):
        yield name.removesuffix("weight"), *make(tensor.float().numpy())
    else:
        yield name, {"": tensor}, None


def _index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if path.exists():
        files = sorted(folder.glob("*.safetensors"))
        path.write_text(json.dumps({"metadata": {}, "weight_map": {name: f.name for f in files for name in load_file(f)}}))
