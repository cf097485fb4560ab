"""The wide checkpoint computes what nano computes, and the benchmark's ratios point the right way."""

import pytest
import torch

from moe_prism.model import load_model


@pytest.mark.slow
def test_one_wide_layer_is_nanos(script, tmp_path):
    """2.5 GB. Without a split of the halves' routing the two models differ by rounding to bfloat16 alone."""
    script("wide_nano").build(tmp_path / "wide", 1, split=0.0)
    nano = load_model("nano", torch.float32)
    nano.model.layers = nano.model.layers[:1]
    wide = load_model(tmp_path / "wide", torch.float32)
    assert (wide.config.hidden_size, wide.config.num_experts, wide.config.num_experts_per_tok) == (2048, 64, 8)
    ids = torch.randint(0, nano.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = nano(ids).logits.log_softmax(-1), wide(ids).logits.log_softmax(-1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-6


def test_a_ratio_above_one_is_faster(script):
    seconds = {("serve", 1.0): [4.0, 8.0], ("serve", 0.5): [2.0, 4.0], ("stock", 1.0): [6.0, 12.0], ("stock", 0.5): [3.0, 3.0]}
    row = script("end_to_end").row("serve", 8, 0.5, seconds, {"slots": 0.5, "token": 0.52, "distinct": 0.7})
    assert (row["of full"], row["of stock full"], row["of stock top-4"]) == (2.0, 3.0, 1.125)
    assert (row["tokens/s"], row["kept"], row["bytes"]) == (pytest.approx(2.67), 0.5, 0.7)
