"""Tests of `moe_prism.checkpoint`."""
