"""Compile the kernels for GPUs that are not there: python compile_kernels.py CAPABILITIES TYPES ROWS NEURONS COLUMNS WARPS STAGES.

A program of its own because a process that interprets the kernels cannot compile them. Loads their file alone, which is quick.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

STEP = {"bf16": 64, "fp32": 32}
LISTS = dict.fromkeys(("slots", "tile_group", "tile_first", "tile_end"), "*i32")
SMALL_GPU = 99 * 1024  # bytes of shared memory


def load():
    source = Path(__file__).parents[2] / "src/moe_prism/kernels/triton_kernels.py"
    spec = spec_from_file_location("triton_kernels", source)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compile_one(kernel, types, constants, capability, warps, stages):
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in types},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def main(capabilities, types, rows, neurons, columns, warps, stages):
    kernels = load()
    for capability in map(int, capabilities.split(",")):
        for kind in types.split(","):
            w = "*" + kind
            common = {"D": 2048, "BLOCK": 352, "N_SUB": 4, "PER_TOKEN": 24, "ROWS": rows, "DEPTH": STEP[kind]}
            plain = {"GROUP": 0, "BYTES": 0, "BOTH": False, "MASK": 0, "UNIT": 1.0, "OFFSET": 0.0}
            common |= plain
            up = LISTS | {"x": w, "gate": w, "up": w, "a": w, "x_row": "i32", "w_expert": "i32", "w_row": "i32"}
            down = LISTS | {"a": w, "weight": w, "routing": w, "out": "*fp32", "w_expert": "i32", "w_col": "i32"}
            sums = {"rows": "*fp32", "keep": "*u8", "out": w}
            for kernel, arguments, constants in (
                (kernels.gate_up, up, common | {"x_col": 1, "w_col": 1, "ACT": "silu", "COLUMNS": neurons}),
                (kernels.down, down, common | {"w_row": 1, "ATOMIC": False, "COLUMNS": columns}),
                (kernels.down, down, common | {"w_row": 1, "ATOMIC": True, "COLUMNS": columns}),
                (kernels.combine, sums, {"D": 2048, "PER_TOKEN": 24, "COLUMNS": 512}),
            ):
                made = compile_one(kernel, arguments, constants, capability, warps, stages)
                code = made.asm["ptx"]
                assert made.metadata.shared <= SMALL_GPU, f"{made.metadata.shared} bytes of shared memory"
                assert "st.local" not in code, "registers went to memory"
                if "DEPTH" in constants and capability >= 90 and kind == "bf16" and rows >= 64:
                    assert "wgmma" in code, "not on the matrix units of this generation"


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
