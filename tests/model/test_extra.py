"""Extra experts against a sum over tokens and choices."""

from __future__ import annotations

import pytest
import torch

from moe_prism.errors import UsageError
from moe_prism.model import ExtraExperts

D, FIRST = 6, 8
VECTORS = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
MIXED = ExtraExperts(("constant", "zero", "copy", "constant", "copy"), VECTORS)


def batch(tokens: int, k: int, ids: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices among all ids below `ids`, some twice by one token, and -1."""
    generator = torch.Generator().manual_seed(tokens)
    index = torch.randint(-1, ids, (tokens, k), generator=generator)
    return torch.randn(tokens, D, generator=generator), index, torch.rand(tokens, k, generator=generator)


def brute(extra: ExtraExperts, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(x), D)
    for t in range(len(x)):
        for e, w in zip((index[t] - FIRST).tolist(), weight[t].tolist(), strict=True):
            if 0 <= e < len(extra):
                kind = extra.kinds[e]
                row = extra.kinds[:e].count("constant")
                out[t] += w * {"zero": torch.zeros(D), "copy": x[t], "constant": VECTORS[row % len(VECTORS)]}[kind]
    return out


@pytest.mark.parametrize("extra", [MIXED, ExtraExperts(("copy",) * 3), ExtraExperts(("zero", "copy"))])
@pytest.mark.parametrize("tokens", [1, 40])
def test_brute_force(extra: ExtraExperts, tokens: int) -> None:
    x, index, weight = batch(tokens, 5, FIRST + len(extra) + 2)
    index[0, 0] = FIRST + extra.kinds.index("copy")  # at least one that adds something
    out = extra(x, index, weight, FIRST)
    assert out is not None and out.dtype == torch.float32
    torch.testing.assert_close(out, brute(extra, x, index, weight))


def test_a_token_gets_the_same_bits_alone() -> None:
    x, index, weight = batch(30, 4, FIRST + len(MIXED))
    index[:, 0] = FIRST
    together = MIXED(x, index, weight, FIRST)
    assert together is not None
    for t in range(len(x)):
        alone = MIXED(x[t : t + 1], index[t : t + 1], weight[t : t + 1], FIRST)
        assert alone is not None and torch.equal(alone[0], together[t])


def test_half_precision_inputs_add_up_in_float32() -> None:
    x, index, weight = batch(9, 3, FIRST + len(MIXED))
    index[:, 0] = FIRST + 2
    out = MIXED(x.bfloat16(), index, weight.bfloat16(), FIRST)
    assert out is not None and out.dtype == torch.float32
    torch.testing.assert_close(out, brute(MIXED, x.bfloat16().float(), index, weight.bfloat16().float()))


def test_none_where_nothing_is_added() -> None:
    x, index, weight = batch(7, 3, FIRST)
    assert MIXED(x, index, weight, FIRST) is None
    assert MIXED(x, index, weight, FIRST + 1) is None
    assert ExtraExperts(("zero", "zero"))(x, torch.full_like(index, FIRST), weight, FIRST) is None
    assert ExtraExperts(())(x, index, weight, FIRST) is None


def test_parameters_are_those_of_constant_experts() -> None:
    assert len(MIXED) == 5
    assert MIXED.parameters == (D, 0, 0, D, 0)
    assert ExtraExperts(("copy", "zero")).parameters == (0, 0)


@pytest.mark.parametrize("vectors", [None, VECTORS[0], VECTORS[:1]])
def test_the_number_of_vectors_must_fit(vectors: torch.Tensor | None) -> None:
    with pytest.raises(UsageError, match="2 constant experts with vectors"):
        ExtraExperts(("constant", "constant"), vectors)


def test_vectors_without_a_constant_expert_are_refused() -> None:
    with pytest.raises(UsageError, match="0 constant experts"):
        ExtraExperts(("copy",), VECTORS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown kind of extra expert 'const'.*did you mean 'constant'"):
        ExtraExperts(("const",))  # type: ignore[arg-type]
