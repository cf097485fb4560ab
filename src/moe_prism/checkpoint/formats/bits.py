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
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device)
    return ((octets[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def pack_octets(codes: Tensor, bits: int) -> Tensor:
    """The reverse."""
    per = 8 // bits
    octets = codes[..., ::per].contiguous()
    for place in range(1, per):
        octets |= codes[..., place::per] << (bits * place)
    return octets


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] of any width as one stream of bits per row, uint8 [..., ceil(n * bits / 8)], filled up with zeros."""
    if 8 % bits == 0:
        return pack_octets(torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (8 // bits))), bits)
    n = codes.shape[-1]
    eights = torch.unflatten(torch.nn.functional.pad(codes, (0, -n % 8)), -1, (-1, 8)).long()
    words = (eights << (bits * torch.arange(8, device=codes.device))).sum(-1, keepdim=True)
    octets = (words >> (8 * torch.arange(bits, device=codes.device))) & 255
    return octets.to(torch.uint8).flatten(-2)[..., : -(-n * bits // 8)].contiguous()


def unpack_dense(octets: Tensor, bits: int, n: int) -> Tensor:
    """The reverse: codes [..., n] as uint8."""
    if 8 % bits == 0:
        return unpack_octets(octets, bits)[..., :n]
    parts = torch.unflatten(torch.nn.functional.pad(octets, (0, -octets.shape[-1] % bits)), -1, (-1, bits)).long()
    words = (parts << (8 * torch.arange(bits, device=octets.device))).sum(-1, keepdim=True)
    codes = (words >> (bits * torch.arange(8, device=octets.device))) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :n]
