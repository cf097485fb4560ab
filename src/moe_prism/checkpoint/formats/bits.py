"""Codes of a few bits, packed into bytes and words of 32 bits, the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> codes 0..2^bits - 1 as uint8 [..., n * 32 / bits]. bits divides 8."""
    return unpack_octets(words.contiguous().view(torch.uint8), bits)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The reverse; codes that do not fill the last word are filled up with zeros."""
    short = -codes.shape[-1] % (WORD_BITS // bits)
    return pack_octets(torch.nn.functional.pad(codes, (0, short)), bits).view(torch.int32)


def unpack_octets(octets: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] -> codes 0..2^bits - 1 as uint8 [..., n * 8 / bits]."""
    if bits == 8:
        return octets
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((octets[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def pack_octets(codes: Tensor, bits: int) -> Tensor:
    """The reverse."""
    per = 8 // bits
    octets = codes[..., ::per].contiguous()
    for place in range(1, per):
        octets |= codes[..., place::per] << (bits * place)
    return octets
