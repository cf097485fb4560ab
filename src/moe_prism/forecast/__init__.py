"""Predicted times and sizes: what a step, its reads or its scheduling will take."""
