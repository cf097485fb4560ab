"""What a step takes, against a link and a processor that are watched record by record."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_prism.offload.timeline import stall, step_time

COUNTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6)


def watched(layer: int, record: int, counts: list[tuple[int, int]]) -> int:
    """When the last layer ends, tick by tick: one link with a queue, one processor. counts: (read ahead, missed) of every layer."""
    queue = [0] * sum(counts[0])  # the layers that records in the queue belong to, one entry per record
    at, left_to_read, left_to_compute, now = 0, record, 0, 0
    waits_for = [sum(both) for both in counts]
    computing = False
    while at < len(counts):
        if not computing and waits_for[at] == 0:
            computing, left_to_compute = True, layer
            if at + 1 < len(counts):
                queue += [at + 1] * counts[at + 1][0]
        # one tick of both
        now += 1
        if queue:
            left_to_read -= 1
            if left_to_read == 0:
                waits_for[queue.pop(0)] -= 1
                left_to_read = record
        if computing:
            left_to_compute -= 1
            if left_to_compute == 0:
                computing, at = False, at + 1
                if at < len(counts):
                    queue += [at] * counts[at][1]
    return now


@given(st.integers(1, 5), st.integers(1, 5), COUNTS)
def test_a_step_takes_what_a_watched_one_takes(layer, record, counts):
    ahead, missing = ([record * count[i] for count in counts] for i in (0, 1))
    assert step_time(layer, ahead, missing) == watched(layer, record, counts)


def test_reads_that_fit_beside_the_computation_cost_nothing():
    assert stall(3.0, 3.0, 0.0) == 0
    assert stall(3.0, 4.0, 0.0) == 1
    assert stall(3.0, 2.0, 5.0) == 5  # time left over is of no use to a miss, which is known too late


def test_work_for_reads_hides_behind_nothing():
    assert stall(3.0, 4.0, 0.0, busy=1.0) == 1
    assert stall(3.0, 6.0, 0.0, busy=1.0) == 3
    assert step_time(3.0, [4.0, 4.0], [0.0, 2.0], [1.0, 1.0]) == 6 + 4 + 1 + 2  # nothing computes before the first layer
