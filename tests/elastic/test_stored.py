"""Points whose weights are stored in few bits: few rows run from planes, as they do from weights that are written out."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.smoothed import SmoothChange
from moe_prism.elastic.execute.stored import FEW_ROWS, StoredExperts
from moe_prism.kernels.plane_tiles import AVAILABLE
from moe_prism.point import OperatingPoint

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="no instructions that multiply bytes")
IDS = torch.randint(3, 1000, (1, FEW_ROWS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Matrices of whole groups and tiles."""
    from tests.tiny_sources import save_tiny

    folder = tmp_path_factory.mktemp("stored") / "m"
    save_tiny("olmoe", folder, hidden_size=64, intermediate_size=32)
    return open_model(folder).model


def widths(*rows):
    return tuple(tuple(map(float, row)) for row in rows)


CHANGES = {
    "int8": QuantizeChange(Rtn(), 8.0, 32),
    "int4": QuantizeChange(Rtn(), 4.0, 32),
    "a width per expert, one gone": QuantizeChange(Rtn(), widths((1, 2, 3, 0), (4, 8, 3, 2)), 32),
    "nested": QuantizeChange(Nested(), 3.0, 32),
    "evened out": SmoothChange(QuantizeChange(Rtn(), 4.0, 32), ((1, -1) * 32, (0, 2) * 32)),
}


@torch.no_grad()
def logits(model, change, ids, word):
    """word: `stock` computes with what is written out."""
    calls = []
    call = StoredExperts.__call__
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", {"MOE_PRISM_WHOLE": word}))
        seen = lambda self, *slots: calls.append(call(self, *slots)) or calls[-1]  # noqa: E731
        stack.enter_context(mock.patch.object(StoredExperts, "__call__", seen))
        with model._moe_prism.at([OperatingPoint(weights=change.part())]):
            out = model(input_ids=ids, use_cache=False).logits
    return out, sum(own is not None for own in calls)


@pytest.mark.parametrize("name", CHANGES)
def test_few_rows_run_from_planes_as_from_what_they_decode_to(model, name):
    wanted, none = logits(model, CHANGES[name], IDS, "stock")
    found, calls = logits(model, CHANGES[name], IDS, "measure")
    assert none == 0 and calls == 2
    assert float((found - wanted).norm() / wanted.norm()) < 2e-4


def test_other_weights_and_more_rows_are_computed_as_before(model):
    wide = torch.cat([IDS, IDS], 1)
    for change, ids in (
        (QuantizeChange(Rtn(symmetric=False), 4.0, 32), IDS),
        (QuantizeChange(Rtn(), widths((4, 4, 4, 16), (16, 16, 16, 2)), 32), IDS),
        (CHANGES["int4"], wide),
    ):
        wanted, found = (logits(model, change, ids, word) for word in ("stock", "measure"))
        assert found[1] == 0
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    plain = OperatingPoint()
    with torch.no_grad(), model._moe_prism.at([plain]):
        before = model(input_ids=IDS, use_cache=False).logits
    logits(model, CHANGES["int4"], IDS, "measure")
    with torch.no_grad(), model._moe_prism.at([plain]):
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
