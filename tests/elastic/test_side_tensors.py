"""The side tensors of an artefact: their names, those that version 0.1 wrote, and what does not belong there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from moe_prism.artefact.load import SIDE_FILE, flat_side_tensors, side_tensors
from moe_prism.elastic.side_tensors import CUTOFFS, LAYER_BUDGETS, expert_dimension
from moe_prism.errors import CorruptError, UsageError


def test_what_is_written_is_read_by_layer(tmp_path):
    made = [{CUTOFFS: torch.ones(129)}, {CUTOFFS: torch.zeros(129), "compensate.mean.vectors": torch.ones(2, 2, 2)}]
    save_file(flat_side_tensors(made), str(tmp_path / SIDE_FILE))
    for given, read in zip(made, side_tensors(tmp_path, 2), strict=True):
        assert given.keys() == read.keys()
        assert all(torch.equal(given[name], read[name]) for name in given)


def test_the_names_of_version_0_1_are_understood(tmp_path):
    save_file({"layers.0.levels": torch.ones(129), "layers.0.plan": torch.zeros(8)}, str(tmp_path / SIDE_FILE))
    (own,) = side_tensors(tmp_path, 1)
    assert own.keys() == {CUTOFFS, LAYER_BUDGETS}


@pytest.mark.parametrize("name", ["layers.1.ridge", "ridge", "layers.x.ridge", "layers.0."])
def test_a_tensor_of_no_layer_is_refused_by_name(tmp_path, name):
    save_file({name: torch.ones(2)}, str(tmp_path / SIDE_FILE))
    with pytest.raises(CorruptError, match=f"'{name}' belongs to none of 1 layers"):
        side_tensors(tmp_path, 1)


def test_pruning_knows_where_the_experts_are():
    assert [expert_dimension(name) for name in (CUTOFFS, "ridge", "repair", "compensate.mean.vectors")] == [None, 0, 1, 0]
    with pytest.raises(UsageError, match="'new' is not known"):
        expert_dimension("new")
