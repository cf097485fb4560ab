"""What keeping a quantized source's format costs: KL of `refactor --keep-format` against the quantized nano, on held-out text.

    python benchmarks/keep_format.py [--forms fp8,ct-mxfp4,nvfp4,int4,awq] [--against nearest,plain,codes]

Baselines in the same run: `nearest`, every code the nearest one to its weight, in the same scales; `plain`, also scales that reach each
group's largest value, not searched and every neuron alike; `codes`, what --keep-codes gives. Nano's experts are 128 wide, so FP8 has
blocks of 32 x 32 here to have four of them. Forms: tests/checkpoint/quantized.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from moe_prism.artefact import keep_format
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint.formats import grids, requantize
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.model.named import NANO
from tests.checkpoint import quantized

CALIBRATION = CalibrateOptions(text="stdlib", tokens=8192, length=512)
BLOCK = (32, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default="fp8,ct-mxfp4,nvfp4,int4,awq")
    parser.add_argument("--against", default="nearest")
    given = parser.parse_args()
    against = given.against.split(",") if given.against else []
    settings = {**quantized.FORMS["fp8"][0], "weight_block_size": list(BLOCK)}
    quantized.FORMS["fp8"] = (settings, lambda w: quantized.fp8(w, BLOCK))
    print(f"{'form':12} {'KL':>9} {'error':>8} " + " ".join(f"{name:>9}" for name in against))
    for form in given.forms.split(","):
        with tempfile.TemporaryDirectory() as work:
            root = Path(work)
            quantized.quantize(NANO, root / "q", form)
            calibrate_model(root / "q", root / "calibration", CALIBRATION)
            own = kept(root)
            others = " ".join(f"{BASELINES[name](root)['kl']:9.2e}" for name in against)
            print(f"{form:12} {own['kl']:9.5f} {own['relative_error']:8.4f} {others}", flush=True)


def kept(root: Path, keep: str = "format") -> dict[str, Any]:
    options = RefactorOptions(profile_tokens=0, keep_format=keep == "format", keep_codes=keep == "codes", calibration=CALIBRATION)
    done = refactor(root / "q", root / "out", options, calibration=root / "calibration", force=True)
    facts: dict[str, Any] = done.manifest["kept_format"]
    return facts


def nearest(root: Path) -> dict[str, Any]:
    before = keep_format._neighbours
    try:
        keep_format._neighbours = lambda *_: None
        return kept(root)
    finally:
        keep_format._neighbours = before


def plain(root: Path) -> dict[str, Any]:
    kinds = (grids.Integers, grids.Float4, grids.Float8)
    before = [kind.ratios for kind in kinds], requantize.REFITS, keep_format.column_counts
    try:
        for kind in kinds:
            kind.ratios = (1.0,)
        requantize.REFITS, keep_format.column_counts = 0, lambda *_: {}
        return kept(root)
    finally:
        for kind, ratios in zip(kinds, before[0], strict=True):
            kind.ratios = ratios
        requantize.REFITS, keep_format.column_counts = before[1:]


BASELINES = {"nearest": nearest, "plain": plain, "codes": lambda root: kept(root, "codes")}


if __name__ == "__main__":
    main()
