"""What keeping a quantized source's format costs: KL of `refactor --keep-format` and `--keep-codes` against the quantized nano.

    python benchmarks/keep_format.py [--forms fp8,ct-mxfp4,nvfp4,int4,awq] [--plain-scales]

Baseline in the same run, with --plain-scales: scales that reach each group's largest value, not searched and every neuron alike.
Nano's experts are 128 wide, so FP8 has blocks of 32 x 32 here to have four of them. Forms: tests/checkpoint/quantized.py.
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
    parser.add_argument("--plain-scales", action="store_true")
    given = parser.parse_args()
    settings = {**quantized.FORMS["fp8"][0], "weight_block_size": list(BLOCK)}
    quantized.FORMS["fp8"] = (settings, lambda w: quantized.fp8(w, BLOCK))
    print(f"{'form':12} {'searched KL':>12} {'error':>8} {'plain KL':>9} {'ratio':>6} {'codes KL':>10}")
    for form in given.forms.split(","):
        with tempfile.TemporaryDirectory() as work:
            root = Path(work)
            quantized.quantize(NANO, root / "q", form)
            calibrate_model(root / "q", root / "calibration", CALIBRATION)
            searched = kept(root, "format")
            plain = with_plain_scales(root) if given.plain_scales else None
            codes = kept(root, "codes")
            ratio = f"{searched['kl'] / plain['kl']:.2f}" if plain else "-"
            shown = f"{plain['kl']:.5f}" if plain else "-"
            row = f"{searched['kl']:12.5f} {searched['relative_error']:8.4f} {shown:>9} {ratio:>6} {codes['kl']:10.2e}"
            print(f"{form:12} {row}", flush=True)


def kept(root: Path, keep: str) -> dict[str, Any]:
    options = RefactorOptions(profile_tokens=0, keep_format=keep == "format", keep_codes=keep == "codes", calibration=CALIBRATION)
    done = refactor(root / "q", root / "out", options, calibration=root / "calibration", force=True)
    facts: dict[str, Any] = done.manifest["kept_format"]
    return facts


def with_plain_scales(root: Path) -> dict[str, Any]:
    kinds = (grids.Integers, grids.Float4, grids.Float8)
    before = [kind.ratios for kind in kinds], requantize.REFITS, keep_format.importances
    try:
        for kind in kinds:
            kind.ratios = (1.0,)
        requantize.REFITS, keep_format.importances = 0, lambda *_: {}
        return kept(root, "format")
    finally:
        for kind, ratios in zip(kinds, before[0], strict=True):
            kind.ratios = ratios
        requantize.REFITS, keep_format.importances = before[1:]


if __name__ == "__main__":
    main()
