"""Attention over a paged cache against attention over the same keys in a row."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.kernels.paged_decode import DecodeRows, PagedCache, decode_attention


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.sampled_from([1, 4]), st.sampled_from([1, 2]), st.integers(0, 99))
def test_pages_are_read_in_the_order_of_the_table(lengths, page, shared, seed):
    rng = np.random.default_rng(seed)
    kv, width, blocks = 2, 8, max(-(-n // page) for n in lengths)
    heads, stride = kv * shared, page
    keys, values = (rng.standard_normal((len(lengths) * blocks * stride, kv, width)).astype(np.float32) for _ in range(2))
    table = rng.permutation(len(lengths) * blocks).reshape(len(lengths), blocks).astype(np.int64)
    query = rng.standard_normal((len(lengths), heads, width)).astype(np.float32)
    out = np.empty_like(query)
    rows = DecodeRows(query, table, np.array(lengths, np.int64), out)
    decode_attention(rows, PagedCache(keys, values, page, stride), 0.5)
    for r, length in enumerate(lengths):
        place = [table[r, j // page] * stride + j % page for j in range(length)]
        k, v = (np.repeat(x[place], shared, 1) for x in (keys, values))
        score = np.einsum("hd,jhd->hj", query[r], k) * 0.5
        weight = np.exp(score - score.max(1, keepdims=True))
        expected = np.einsum("hj,jhd->hd", weight / weight.sum(1, keepdims=True), v)
        np.testing.assert_allclose(out[r], expected, rtol=1e-4, atol=1e-5)
