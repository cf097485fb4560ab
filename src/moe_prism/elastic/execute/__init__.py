"""Executors: compute the kept slots of a batch, from weights in memory."""
