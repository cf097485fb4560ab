"""Quantized weights in another order, in their own format: what moves exactly, what is quantized again, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from moe_prism.checkpoint.formats import source_formats
from moe_prism.checkpoint.formats.requantize import TOGETHER, Counts, move, quantize

from . import quantized

ROLES = {
    "weight": "codes", "weight_packed": "codes", "qweight": "codes", "_blocks": "codes", "weight_scale": "scales",
    "weight_scale_inv": "scales", "scales": "scales", "_scales": "scales", "weight_zero_point": "zeros", "qzeros": "zeros",
    "weight_global_scale": "global", "weight_scale_2": "second", "weight_shape": "shape", "g_idx": "g_idx",
}  # fmt: skip
ROWS, COLUMNS, GROUP = 64, 128, quantized.GROUP


@pytest.fixture(params=quantized.FORMS)
def stored(request):
    """(format, its tensors by role, the matrix they are) of a random weight."""
    settings, make = quantized.FORMS[request.param]
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * (1 + torch.arange(COLUMNS) / COLUMNS)
    made, _ = make(w[None].numpy() if request.param == "mxfp4" else w.numpy())
    parts = {ROLES[end]: t for end, t in made.items() if end in ROLES}
    form = source_formats.get(settings["quant_method"])(settings)
    return form, parts, form.matrix(parts)


def one(matrix):
    return next(matrix.each()) if matrix.codes.ndim > 2 else matrix


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_it_is_written_as_it_was_read(stored):
    form, parts, matrix = stored
    back = form.tensors(matrix, parts)
    assert {"codes", "scales"} <= set(back) <= set(parts)
    for role, tensor in back.items():
        assert (tensor.shape, tensor.dtype) == (parts[role].shape, parts[role].dtype)
        assert torch.equal(raw(tensor), raw(parts[role]))


def test_rows_and_whole_groups_of_columns_move_to_the_bit(stored):
    matrix = one(stored[2])
    rows = torch.arange(ROWS // 16).flip(0)[:, None] * 16 + torch.arange(16)  # whole blocks of 16 rows, as FP8 has them here
    columns = torch.arange(COLUMNS // GROUP).roll(1)[:, None] * GROUP + torch.arange(GROUP).flip(
        0
    )  # inside a group any order will do
    moved = move(matrix, rows.flatten(), columns.flatten())
    assert moved.again == 0 and moved.error == 0
    assert torch.equal(moved.matrix.values(), matrix.values()[rows.flatten()][:, columns.flatten()])


def test_other_columns_are_quantized_again_and_their_error_is_told(stored):
    form, parts, matrix = stored
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    moved = move(one(matrix), torch.arange(ROWS), order)
    wanted = one(matrix).values()[:, order]
    error = float((moved.matrix.values() - wanted).double().square().sum())
    assert error == pytest.approx(moved.error, rel=1e-6, abs=1e-12)
    alone = matrix.group[1] >= COLUMNS or matrix.group[1] == 1
    assert (moved.again == 0) == alone
    assert (error / float(wanted.double().square().sum())) ** 0.5 < 0.1
    if matrix.codes.ndim == 2:  # what is stored is what was meant
        again = form.matrix({**parts, **form.tensors(moved.matrix, parts)})
        assert torch.equal(again.values(), moved.matrix.values())


def test_a_searched_scale_is_no_worse_than_one_that_reaches_the_largest_value(stored):
    matrix = one(stored[2])
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    wanted = matrix.values()[:, order]
    simple = type(matrix.grid)
    found = quantize(wanted, matrix)
    ratios, simple.ratios = simple.ratios, (1.0,)
    try:
        plain = quantize(wanted, matrix)
    finally:
        simple.ratios = ratios
    assert (found.values() - wanted).square().sum() <= (plain.values() - wanted).square().sum() * (1 + 1e-6)


def test_important_columns_keep_more(stored):
    matrix = one(stored[2])
    if matrix.group[1] in (1, COLUMNS):
        pytest.skip("its columns move exactly")
    wanted = matrix.values()[:, torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    importance = torch.where(torch.arange(COLUMNS) % 4 == 0, 100.0, 1.0)

    def lost(found):
        return float(((found.values() - wanted).square() * importance).sum())

    assert lost(quantize(wanted, matrix, Counts(importance))) <= lost(quantize(wanted, matrix)) * (1 + 1e-6)


def test_neighbours_take_up_what_rounding_leaves(stored):
    """Inputs of few directions: the same scales, and a smaller error of the output on rows that the codes were not chosen on."""
    matrix = one(stored[2])
    if matrix.group[1] in (1, COLUMNS):
        pytest.skip("its columns move exactly")
    wanted = matrix.values()[:, torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    inputs = torch.randn(1024, 12, generator=torch.Generator().manual_seed(2)) @ torch.randn(
        12, COLUMNS, generator=torch.Generator().manual_seed(3)
    )
    seen, other = inputs[:512].unflatten(1, (-1, TOGETHER)).movedim(0, 1), inputs[512:]
    alone = inputs[:512].square().mean(0).sqrt()
    apart, together = quantize(wanted, matrix, Counts(alone)), quantize(wanted, matrix, Counts(alone, seen.mT @ seen / 512))
    assert torch.equal(apart.scales, together.scales)

    def lost(found):
        return float((other @ (found.values() - wanted).T).square().sum())

    assert lost(together) <= 0.8 * lost(apart)


def test_a_last_block_that_is_not_full_is_fed_back_alone():
    like = source_formats.get("compressed-tensors")(quantized.FORMS["int4"][0])
    w = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    made, _ = quantized.ct_int4(torch.nn.functional.pad(w, (0, 24)).numpy())
    matrix = one(like.matrix({ROLES[end]: t for end, t in made.items() if end in ROLES}))
    inputs = torch.randn(256, 40)
    blocks = torch.nn.functional.pad(inputs, (0, 24)).unflatten(1, (-1, TOGETHER)).movedim(0, 1)
    found = quantize(w, matrix, Counts(torch.ones(40), blocks.mT @ blocks / 256))
    assert found.codes.shape == (16, 40) and (found.values() - w).abs().max() < 0.5
