"""What every codec of the registry must do, and what each says of itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_prism.checkpoint.formats.bits import pack_dense, unpack_dense
from moe_prism.compress.codec import Codec, Plane, Planes, codecs
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.codec.signs import Binary, Ternary
from moe_prism.errors import UsageError

EVERY = [pytest.param(codec, id=f"{codec!r}") for name in codecs.names() for codec in codecs.get(name).example()]
TAKING_GRAMS = [p for p in EVERY if p.values[0].takes_gram]
SEEDS = (0, 1, 2)


def weights(seed: int, *shape: int) -> torch.Tensor:
    """Rows of different sizes, as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.02 * torch.randn(*shape[:-1], 1, generator=generator).exp()
    return torch.randn(*shape, generator=generator) * size


def inputs(seed: int, width: int, rows: int = 512) -> torch.Tensor:
    """Inputs of which some directions are large."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0, 3, width).neg().exp()[:, None]
    return torch.randn(rows, width, generator=generator) @ (size * torch.randn(width, width, generator=generator))


def error(codec: Codec, matrix: torch.Tensor, bits: float, gram: torch.Tensor | None = None, group: int | None = None) -> float:
    planes = codec.encode(matrix, bits, codec.groups[0] if group is None else group, gram)
    return float((codec.decode(planes, bits) - matrix).square().mean())


@pytest.mark.parametrize("codec", EVERY)
@pytest.mark.parametrize("shape", [(3, 8, 256), (16, 96), (2, 2, 4, 130)], ids=str)
def test_bytes_are_those_of_the_planes(codec: Codec, shape: tuple[int, ...]) -> None:
    for bits, group in itertools.product(codec.legal, codec.groups):
        planes = codec.encode(weights(0, *shape), bits, group)
        assert planes.shape == shape and planes.widths[-1] == bits
        for width in planes.widths:
            assert planes.bytes(width) == codec.bytes(shape, width, group)
            assert codec.decode(planes, width).shape == shape


@pytest.mark.parametrize("codec", EVERY)
def test_what_was_stored_is_stored_again(codec: Codec) -> None:
    """Rounding what is already on the grid changes little; alone or together, the same bytes."""
    matrix, bits, group = weights(0, 3, 16, 256), codec.legal[-1], codec.groups[0]
    planes = codec.encode(matrix, bits, group)
    for at, each in enumerate(matrix):
        alone = codec.encode(each, bits, group)
        for one, both in zip(alone.planes, planes.planes, strict=True):
            assert all(torch.equal(tensor, both.tensors[role][at]) for role, tensor in one.tensors.items())
    assert torch.equal(codec.decode(planes, bits), codec.decode(codec.encode(matrix, bits, group), bits))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("codec", EVERY)
def test_the_error_falls_with_the_bits(codec: Codec, seed: int) -> None:
    matrix = weights(seed, 2, 32, 256)
    found = [error(codec, matrix, bits) for bits in codec.legal]
    assert all(low > high for low, high in itertools.pairwise(found))
    assert found[0] < float(matrix.square().mean())


class Untouchable(Mapping[str, Any]):
    """Planes that must not be read."""

    def __getitem__(self, key: str) -> Any:
        raise AssertionError("a plane beyond the width was read")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a plane beyond the width was read")

    def __len__(self) -> int:
        raise AssertionError("a plane beyond the width was read")


@pytest.mark.parametrize("codec", EVERY)
def test_a_width_reads_its_own_planes_alone(codec: Codec) -> None:
    bits, group = codec.legal[-1], codec.groups[0]
    planes = codec.encode(weights(0, 2, 8, 256), bits, group)
    for last, width in enumerate(planes.widths, 1):
        rest = [Plane(plane.bits, Untouchable()) for plane in planes.planes[last:]]
        cut = replace(planes, planes=[*planes.planes[:last], *rest])
        assert torch.equal(codec.decode(cut, width), codec.decode(planes, width))
    with pytest.raises(UsageError, match="not stored at"):
        codec.decode(planes, 11)


@pytest.mark.parametrize("codec", EVERY)
def test_zeros_and_outliers_stay_finite(codec: Codec) -> None:
    matrix = torch.zeros(2, 8, 256)
    matrix[1, 0, 0] = 1000.0
    for bits in codec.legal:
        found = codec.decode(codec.encode(matrix, bits, codec.groups[0]), bits)
        assert torch.isfinite(found).all() and float(found[0].abs().max()) < 1.01


@pytest.mark.parametrize("codec", EVERY)
def test_what_cannot_be_is_refused_by_name(codec: Codec) -> None:
    matrix = weights(0, 8, 256)
    with pytest.raises(UsageError, match="bits"):
        codec.encode(matrix, 11, codec.groups[0])
    with pytest.raises(UsageError, match="inputs per group"):
        codec.encode(matrix, codec.legal[0], 77)
    gram = torch.eye(128) if codec.takes_gram else torch.eye(256)
    with pytest.raises(UsageError, match=r"Gram|feeds no errors"):
        codec.encode(matrix, codec.legal[0], codec.groups[0], gram)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("codec", TAKING_GRAMS)
def test_errors_fed_back_lower_the_outputs_error(codec: Codec, seed: int) -> None:
    """On inputs that the Gram matrix was not made of."""
    matrix = weights(seed, 2, 32, 160)
    x = inputs(seed, 160, 1024)
    seen, unseen = x[:512], x[512:]
    bits, group = codec.legal[0], codec.groups[0]
    alone, fed = (codec.decode(codec.encode(matrix, bits, group, gram), bits) for gram in (None, seen.T @ seen))
    found = [float(((each - matrix) @ unseen.T).square().mean()) for each in (alone, fed)]
    assert found[1] < 0.95 * found[0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_dense_packing_is_exact(bits: int) -> None:
    for n in (1, 7, 8, 33):
        codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        packed = pack_dense(codes, bits)
        assert packed.shape[-1] == -(-n * bits // 8)
        assert torch.equal(unpack_dense(packed, bits, n), codes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_nested_plane_divides_the_error_and_costs_little(seed: int, symmetric: bool) -> None:
    matrix, codec = weights(seed, 2, 64, 256), Nested(symmetric=symmetric)
    planes = codec.encode(matrix, 8, 32)
    errors = [float((codec.decode(planes, bits) - matrix).square().mean()) for bits in planes.widths]
    assert all(low >= 3.5 * high for low, high in itertools.pairwise(errors))
    for bits, found in zip(planes.widths, errors, strict=True):
        assert found <= 1.6 * error(Rtn(symmetric=symmetric), matrix, bits, group=32)


def test_a_lower_nested_width_is_a_prefix() -> None:
    planes = Nested().encode(weights(0, 4, 256), 8, 32)
    assert [plane.bytes for plane in planes.planes[1:]] == [4 * 256 // 8] * 6
    prefix = Planes(planes.shape, planes.group, planes.planes[:3])
    assert torch.equal(Nested().decode(prefix, 4), Nested().decode(planes, 4))


@pytest.mark.parametrize("seed", SEEDS)
def test_ternary_lies_between_one_and_two_bits(seed: int) -> None:
    matrix = weights(seed, 32, 256)
    assert error(Nested(), matrix, 2) < error(Ternary(), matrix, 1.6) < error(Binary(), matrix, 1)
    codes = torch.randint(0, 3, (3, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(Ternary.unpack(Ternary.pack(codes), 13), codes)


@pytest.mark.parametrize("base", [1, 2, 4])
@pytest.mark.parametrize("bits", [4.0, 8.0])
def test_cells_of_nested_planes_are_those_of_the_form_to_read(base, bits):
    """In compiled code; where two sizes are equally good to a rounding, either will do."""
    g = torch.Generator().manual_seed(base)
    values = torch.randn(3, 20, 4, 32, generator=g) * torch.rand(3, 20, 4, 1, generator=g) ** 4
    values[0, 0] = 0
    codec = Nested(base=base)
    low, high = values.amin(-1), values.amax(-1)
    fast = codec.fit(values, bits)
    plain = codec.fit_plainly(values, torch.zeros_like(low), torch.maximum(high, -low), bits)
    assert float((fast["cell"] == plain["cell"]).float().mean()) > 0.99
    error = [float((codec.value(codec.code(values, n, bits), n, bits) - values).square().mean()) for n in (fast, plain)]
    assert error[0] == pytest.approx(error[1], rel=1e-3)


def test_a_width_of_a_wider_file_has_the_files_cells():
    matrix = torch.randn(16, 64)
    file, plain = Nested(most=8), Nested()
    whole, part = plain.encode(matrix, 8, 32), file.encode(matrix, 4, 32)
    assert part.widths == (2, 3, 4) and torch.equal(file.decode(part, 4), plain.decode(whole, 4))
    assert not torch.equal(plain.decode(plain.encode(matrix, 4, 32), 4), file.decode(part, 4))
    assert torch.equal(file.decode(file.encode(matrix, 8, 32), 8), plain.decode(whole, 8))
    assert file.legal == plain.legal and Nested(most=6).legal == (2, 3, 4, 5, 6)
    for wrong in (9, 1):
        with pytest.raises(UsageError, match="a file of"):
            Nested(most=wrong)
