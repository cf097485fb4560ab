"""The tiles on ARM64: cross-compiled to NEON objects, linked to a small C program and run under `qemu-aarch64`. Correctness only."""

import shutil
import subprocess

import numpy as np
import pytest
from llvmlite import binding, ir

from moe_prism.kernels import tiles
from moe_prism.kernels.target import NEON, target_of
from moe_prism.kernels.vector_code import I64, Code, constant

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
TRIPLE = "aarch64-unknown-linux-gnu"
DEPTH = 40

MAIN = """
#include <stdint.h>
#include <stdio.h>
extern void tile(int64_t x, int64_t ids, int64_t w, int64_t out, int64_t o);
int main(int argc, char **argv) {
  static float x[8 * %(depth)d], out[8 * 64];
  static unsigned char w[64 * %(depth)d * 4];
  int64_t ids[8], o[8];
  for (int i = 0; i < 8; i++) { ids[i] = (3 * i + 1) %% 8; o[i] = 7 - i; }
  fread(x, 4, sizeof x / 4, stdin);
  fread(w, 1, sizeof w, stdin);
  fread(out, 4, sizeof out / 4, stdin);
  tile((int64_t)x, (int64_t)ids, (int64_t)w, (int64_t)out, (int64_t)o);
  fwrite(out, 4, sizeof out / 4, stdout);
  return 0;
}
"""


def object_of(shape, kind, size):
    """The machine code of one tile as `tile(x, ids, w, out, o)`, and its assembly."""
    module = ir.Module()
    module.triple = TRIPLE
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 5), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    x, ids, w, out, o = function.args
    code, n = Code(builder, NEON.lanes, size, fused=NEON.fused), constant
    if kind == "dot":
        given = tiles.DotValues(x, ids, n(DEPTH), w, n(DEPTH), n(DEPTH), out, o, n(64), n(2))
        tiles._dot_tile(code, *shape, given)
    else:
        given = tiles.AddValues(x, n(DEPTH), w, n(64), n(DEPTH), out, o, n(64))
        tiles._add_tile(code, *shape, given)
    builder.ret_void()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(TRIPLE).create_target_machine(opt=2, reloc="pic")
    parsed = binding.parse_assembly(str(module))
    return machine.emit_object(parsed), machine.emit_assembly(parsed)


def expected(shape, kind, x, w, out):
    rows, columns, _ = shape
    ids, o = [(3 * i + 1) % 8 for i in range(rows)], [7 - i for i in range(rows)]
    result = out.copy()
    for r in range(rows):
        if kind == "dot":
            result[o[r], : 2 * columns : 2] = (w.reshape(-1, DEPTH)[:columns] @ x[ids[r]]).astype(np.float32)
        else:
            width = columns * NEON.lanes
            result[o[r], :width] += (x[r] @ w.reshape(-1, 64)[:DEPTH, :width]).astype(np.float32)
    return result


CASES = [("dot", (r, c, f)) for r, c, f in ((1, 4, 0), (3, 4, 1), (6, 4, 0), (2, 1, 1))]
CASES += [("add", (r, v, f)) for r, v, f in ((1, 8, 0), (4, 4, 1), (6, 1, 0))]


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_tiles_under_an_emulator(kind, shape, size, tmp_path):
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(
            f"{' and '.join(missing)} missing (Debian: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"
        )
    try:
        code, assembly = object_of(shape, kind, size)
    except RuntimeError as error:
        pytest.skip(f"llvmlite has no ARM64: {error}")
    assert "fmla" in assembly and ".4s" in assembly  # vectors of four, multiplied and added in one instruction
    (tmp_path / "tile.o").write_bytes(code)
    (tmp_path / "main.c").write_text(MAIN % {"depth": DEPTH})
    program = tmp_path / "program"
    subprocess.run([COMPILER, "-static", "-O1", "-w", "-o", program, tmp_path / "main.c", tmp_path / "tile.o"], check=True)
    g = np.random.default_rng(0)
    x, out = g.standard_normal((8, DEPTH), np.float32), g.standard_normal((8, 64), np.float32)
    bits = g.standard_normal(64 * DEPTH, np.float32).view(np.uint32) & 0xFFFF0000
    w = bits.view(np.float32)
    stored = w.tobytes() if size == 4 else (bits >> 16).astype(np.uint16).tobytes().ljust(64 * DEPTH * 4, b"\0")
    done = subprocess.run([EMULATOR, program], input=x.tobytes() + stored + out.tobytes(), capture_output=True, check=True)
    found = np.frombuffer(done.stdout, np.float32).reshape(8, 64)
    np.testing.assert_allclose(
        found, expected(shape, kind, x.astype(np.float64), w.astype(np.float64), out), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    ("triple", "features", "name"),
    [
        ("x86_64-unknown-linux-gnu", "+avx512f,+avx512vl,+avx2,+fma", "avx512"),
        ("x86_64-unknown-linux-gnu", "-avx512f,+avx2,+fma", "avx2"),
        ("x86_64-unknown-linux-gnu", "+sse4.2,-avx2", "sse"),
        ("aarch64-unknown-linux-gnu", "+neon", "neon"),
        ("arm64-apple-darwin23", "", "neon"),
    ],
)
def test_the_instruction_set_of_a_target(triple, features, name):
    assert target_of(triple, features).name == name
