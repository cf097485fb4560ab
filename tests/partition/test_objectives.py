"""Objectives are scalings of rows and columns."""

import numpy as np

from moe_prism.partition import objectives


def test_each_objective_by_hand():
    mass = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    weight, down = np.array([0.5, 2.0], np.float32), np.array([10.0, 1.0], np.float32)
    found = {name: objectives.get(name)(mass, weight, down).tolist() for name in objectives.names()}
    assert found == {
        "paper": [[1, 2], [3, 4]],
        "output": [[10, 2], [30, 4]],
        "router": [[0.5, 1], [6, 8]],
        "output-router": [[5, 1], [60, 8]],
        "output-space": [[5, 1], [60, 8]],  # where its refinement starts
    }
