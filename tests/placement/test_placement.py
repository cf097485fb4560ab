"""Placement against the published example, against brute force on small cases, and on the shipped trace."""

from __future__ import annotations

import json
from itertools import combinations, permutations, product

import numpy as np
import pytest

from moe_prism import PlaceOptions, UsageError, place_experts
from moe_prism.cli import main
from moe_prism.offload import load_trace
from moe_prism.placement import Cluster, Demand, ExpertPlacement, demand_of, mixed, placements, simulate
from moe_prism.placement.demand import wanted
from moe_prism.placement.devices import _between, assign, traffic
from moe_prism.placement.eplb import eplb
from moe_prism.placement.moetuner import clusters
from moe_prism.placement.packing import pack

from ..offload.common import make, sticky, uniform

LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
PUBLISHED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def demand(load, parts=1, flow=None):
    """Of loads [L, E], all blocks alike."""
    load = np.asarray(load, float)
    layers, experts = load.shape
    return Demand(np.repeat(load[:, :, None], parts, 2), np.zeros((layers - 1, experts, experts)) if flow is None else flow)


def test_eplb_is_the_published_example():
    assert eplb(demand(LOADS), Cluster(devices=8, spare=4, nodes=2), groups=4).slots.tolist() == PUBLISHED


def test_eplb_by_hand():
    """Loads 8 4 2 2, two spare slots: both go to expert 0, 8/3 each; then 4, 8/3, 8/3, 8/3, 2, 2 on two devices of three slots."""
    found = eplb(demand([[8, 4, 2, 2]]), Cluster(devices=2, spare=2))
    assert found.slots.tolist() == [[1, 0, 3, 0, 0, 2]]
    assert found.loads(demand([[8, 4, 2, 2]])).tolist() == [[4 + 8 / 3 + 2, 16 / 3 + 2]]


@pytest.mark.parametrize("seed", range(8))
def test_two_items_on_each_device_are_packed_as_well_as_can_be(seed):
    load = np.random.default_rng(seed).zipf(1.6, 8).clip(max=100).astype(float)
    assert load[pack(load, 4)].reshape(4, 2).sum(1).max() == pytest.approx(min(s.max() for s in every(load, 4)))


def every(load, devices):
    """Sums of devices, for all ways to share the items out evenly."""

    def ways(items, size):
        if not items:
            yield []
            return
        for rest in combinations(items[1:], size - 1):
            held = (items[0], *rest)
            for others in ways([i for i in items if i not in held], size):
                yield [held, *others]

    for held in ways(list(range(len(load))), len(load) // devices):
        yield np.array([load[list(row)].sum() for row in held])


@pytest.mark.parametrize(("items", "devices"), [(6, 2), (6, 3), (8, 2), (8, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_as_even_as_brute_force(items, devices, seed):
    load = np.random.default_rng(seed).exponential(100, items).round()
    order, bound = clusters(load, devices)
    sums = load[order].reshape(devices, -1).sum(1)
    best = min(np.abs(s - s.mean()).sum() for s in every(load, devices))
    assert np.abs(sums - sums.mean()).sum() <= best * 1.025 + 1e-9, "the paper's gap"
    assert bound <= min(s.max() for s in every(load, devices)) + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_devices_of_three_by_four_layers_are_brute_force(seed):
    flow = np.random.default_rng(seed).exponential(10, (3, 3, 3))
    slots, room = np.tile(np.arange(3), (4, 1)), Cluster(devices=3)
    found = assign(slots, flow, room)
    best = min(
        traffic(list(flow), [np.arange(3), *map(np.array, orders)], room) for orders in product(permutations(range(3)), repeat=3)
    )
    assert traffic(list(flow), list(found), room) == pytest.approx(best)
    assert traffic(list(flow), list(found), room) <= traffic(list(flow), list(slots), room)


@pytest.mark.parametrize("seed", range(3))
def test_devices_on_two_nodes_are_brute_force(seed):
    flow = np.random.default_rng(seed).exponential(10, (2, 4, 4))
    room = Cluster(devices=4, nodes=2, link=4)
    orders = [np.array(o) for o in permutations(range(4))]
    best = min(traffic(list(flow), list(chosen), room) for chosen in product(orders, repeat=3) if chosen[0][0] == 0)
    assert traffic(list(flow), list(assign(np.tile(np.arange(4), (3, 1)), flow, room)), room) == pytest.approx(best)


def test_swaps_beyond_the_exact_program_never_lose_to_the_order_of_numbers():
    flow = np.random.default_rng(0).exponential(10, (3, 8, 8))
    room, slots = Cluster(devices=8, nodes=2, link=4), np.tile(np.arange(8), (4, 1))
    assert traffic(list(flow), list(assign(slots, flow, room)), room) < traffic(list(flow), list(slots), room)


def joint(load, flow, devices):
    """The least traffic of all placements whose every layer is as even as brute force; and the least unevenness."""
    room, layers = Cluster(devices=devices), []
    for row in load:
        orders = [np.array(o) for o in permutations(range(len(row)))]
        costs = [np.abs(row[o].reshape(devices, -1).sum(1) - row.sum() / devices).sum() for o in orders]
        layers.append([o for o, c in zip(orders, costs, strict=True) if c <= min(costs) + 1e-9])
    same = [np.arange(devices)] * len(load)

    def of(chosen):
        held = [o.reshape(devices, -1) for o in chosen]
        return traffic([_between(a, b, f) for f, a, b in zip(flow, held, held[1:], strict=False)], same, room)

    return min(of(chosen) for chosen in product(*layers))


def test_two_stages_are_not_the_joint_optimum_but_near_it():
    ratios = []
    for seed in range(6):
        draw = np.random.default_rng(seed)
        load, flow = draw.integers(1, 5, (2, 4)).astype(float), draw.exponential(10, (1, 4, 4))
        asked, room = demand(load, flow=flow), Cluster(devices=2)
        found = placements.get("moetuner")(asked, room)
        between = _between(*found.slots.reshape(2, 2, 2), flow[0])
        ratios.append(traffic([between], [np.arange(2)] * 2, room) / joint(load, flow, 2))
    assert min(ratios) >= 1 - 1e-9 and np.mean(ratios) < 1.5


@pytest.mark.parametrize("name", placements.names())
@pytest.mark.parametrize(("devices", "spare", "nodes"), [(4, 0, 1), (4, 4, 2), (3, 1, 1), (8, 8, 2)])
def test_everything_is_somewhere_and_devices_hold_as_much(name, devices, spare, nodes):
    trace = make(sticky(200, 3, 8, 2), experts=8, n_sub=4)
    room = Cluster(devices=devices, spare=spare, nodes=nodes, link=2)
    found = placements.get(name)(demand_of(trace), room)
    parts = 4 if found.grain == "blocks" else 1
    assert found.slots.shape == (3, (8 + spare) * parts) and found.devices == devices
    found.check(8 * parts)
    again = placements.get(name)(demand_of(trace), room)
    assert (again.slots == found.slots).all()
    assert found.loads(demand_of(trace)).sum(1) == pytest.approx(np.full(3, 400.0))


def test_bounds_hold_and_even_loads_stay_even():
    asked = demand_of(make(uniform(400, 2, 16, 4), experts=16))
    found = placements.get("moetuner")(asked, Cluster(devices=4))
    assert (found.loads(asked).max(1) >= found.bounds - 1e-9).all()
    even = demand(np.ones((2, 8)), flow=np.ones((1, 8, 8)))
    assert placements.get("moetuner")(even, Cluster(devices=4)).loads(even).max() == 2


def by_hand(trace, placement):
    """(straggler, sends) with loops."""
    keep, waits, sends = wanted(trace), {}, 0
    for row in range(len(trace)):
        for layer in range(trace.layers):
            held, seen = placement.slots[layer].tolist(), set()
            for rank, part in zip(*np.nonzero(keep[row, layer]), strict=True):
                expert = int(trace.expert_ids[row, layer, rank])
                unit = expert if placement.grain == "experts" else expert * trace.n_sub + part
                copies = [s for s, u in enumerate(held) if u == unit]
                device = placement.device_of[copies[row % len(copies)]]
                step = waits.setdefault((int(trace.step[row]), layer), np.zeros(placement.devices))
                step[device] += 1 / trace.n_sub
                seen.add(int(device))
            sends += len(seen - {int(trace.request[row]) % placement.devices})
    steps = len(set(trace.step.tolist()))
    return sum(w.max() for w in waits.values()) / steps, sends / (len(trace) * trace.layers)


@pytest.mark.parametrize("name", ["contiguous", "eplb", "hot-blocks"])
def test_the_simulator_is_a_loop_over_slots(name):
    draw = np.random.default_rng(0)
    kept = draw.integers(0, 16, (60, 2, 2)).astype(np.uint8)
    trace = make(uniform(60, 2, 8, 2), experts=8, n_sub=4, kept=kept, request=np.arange(60) // 6, step=np.arange(60) // 4)
    found = placements.get(name)(demand_of(trace), Cluster(devices=4, spare=4))
    cost = simulate(trace, found)
    straggler, sends = by_hand(trace, found)
    assert cost.straggler == pytest.approx(straggler) and cost.sends == pytest.approx(sends)


def test_a_share_of_requests_at_full_budget():
    trace = load_trace("nano")
    half = mixed(trace, 0.5)
    full = (half.kept == 15).all((1, 2))
    assert len(set(trace.request[full].tolist())) == 12 and mixed(trace, 0) is trace
    assert demand_of(mixed(trace, 1.0)).experts.sum() == len(trace) * 6 * 4


@pytest.fixture(scope="module")
def nano():
    trace = load_trace("nano")
    return demand_of(trace.part("calibration")), trace.part("evaluation").decode()


@pytest.mark.parametrize("spare", [0, 8])
def test_on_nano_moetuner_is_no_worse_than_contiguous_and_eplb(nano, spare):
    asked, rows = nano
    room = Cluster(devices=8, spare=spare)
    found = {name: placements.get(name)(asked, room) for name in ("contiguous", "eplb", "moetuner", "hot-blocks")}
    most = {name: each.loads(asked).max(1).sum() for name, each in found.items()}
    assert most["moetuner"] <= most["eplb"] <= most["contiguous"] and most["hot-blocks"] <= most["eplb"]
    assert simulate(rows, found["moetuner"]).straggler < simulate(rows, found["contiguous"]).straggler


def test_the_command_writes_what_engines_take(tmp_path, capsys):
    out = tmp_path / "placement.json"
    assert main(["place", "nano", "--devices", "8", "--policy", "eplb", "--spare", "8", "-o", str(out), "--json"]) == 0
    written, said = json.loads(out.read_text()), json.loads(capsys.readouterr().out)
    assert list(written) == ["physical_to_logical_map"] and said["of"] == "experts"
    assert all(len(row) == 40 and set(row) == set(range(32)) for row in written["physical_to_logical_map"])
    assert main(["place", "nano", "--devices", "8", "-o", str(out)]) == 2, "it exists"


def test_rooms_that_cannot_be():
    for room in (Cluster(devices=5), Cluster(devices=4, nodes=3), Cluster(devices=0)):
        with pytest.raises(UsageError):
            room.check(32)
    with pytest.raises(UsageError, match="--spare 3 does"):
        place_experts("nano", options=PlaceOptions(devices=5))


def test_it_is_vllms_own_answer(nano):
    policy = pytest.importorskip("vllm.distributed.eplb.policy.default")
    import torch

    load = nano[0].experts
    theirs = policy.DefaultEplbPolicy.rebalance_experts(torch.tensor(load), 40, 1, 1, 8)
    assert eplb(nano[0], Cluster(devices=8, spare=8)).loads(nano[0]).max(1).tolist() == pytest.approx(
        ExpertPlacement(theirs.numpy(), 8).loads(nano[0]).max(1).tolist()
    )
