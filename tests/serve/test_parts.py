"""The parts that need no model: text, sampling, paged attention, levels, configuration, the door."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.artefact.load import load
from moe_prism.elastic.runtime import slots_per_token
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.verify import verify
from moe_prism.point import FULL
from moe_prism.schedule.base import Level
from moe_prism.serve.config import Config, load_config, read_config
from moe_prism.serve.engine.ladder import climb, find_ladder, measure_ladder
from moe_prism.serve.engine.paged_attention import CACHE, Segment, attention, plan
from moe_prism.serve.engine.sampling import Sampler, draw, logprobs
from moe_prism.serve.engine.start import compute_threads
from moe_prism.serve.http.admission import Door
from moe_prism.serve.http.detokenize import Stops
from moe_prism.serve.http.refusal import Refusal
from moe_prism.serve.requests import ErrorKind, Sampling


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_at_the_first_occurrence_however_the_text_comes(pieces, stops):
    made = Stops(stops)
    shown = "".join(made.push(p) for p in pieces) + made.rest()
    text = "".join(pieces)
    at = min((i for i in (text.find(s) for s in stops) if i >= 0), default=None)
    assert (made.found is not None) == (at is not None)
    assert shown == (text if at is None else shown)
    if at is not None:  # the stop string that was complete first ends the text, which may be a longer one that began earlier
        assert text.startswith(shown) and any(text[len(shown) :].startswith(s) for s in stops)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -5.0]])
    sampler = Sampler(Sampling(temperature=0.7, top_p=0.95, seed=3))
    seen = torch.bincount(torch.tensor([draw(logits, [sampler])[0][0] for _ in range(4000)]), minlength=4) / 4000
    p = (logits[0] / 0.7).softmax(0)
    nucleus = p * torch.tensor([1.0, 1.0, 1.0, 0.0]) if p[2] + p[1] < 0.95 else p * torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert torch.allclose(seen, nucleus / nucleus.sum(), atol=0.03)


@given(st.integers(0, 2**31), st.floats(1e-4, 2), st.floats(0.01, 1))
def test_a_draw_does_not_depend_on_its_neighbours(seed, temperature, top_p):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    hot = Sampling(temperature, top_p, seed)
    alone, _ = draw(logits[1:2], [Sampler(hot)])
    among, failed = draw(logits, [Sampler(Sampling()), Sampler(hot), Sampler(Sampling(1.0, 0.5, 9))])
    assert among[1] == alone[0] and among[0] == int(logits[0].argmax()) and not any(failed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_found(bad):
    logits = torch.zeros(3, 8)
    logits[1, 5] = bad
    assert draw(logits, [Sampler(Sampling())] * 3)[1] == [None, ErrorKind.NOT_FINITE, None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_rules_out_every_token_harms_nobody(temperature):
    """Requests made from the schema ended a server: only the end was allowed, and it was not to come yet."""
    impossible = Sampling(temperature, allowed=(5,), min_tokens=3)
    samplers = [Sampler(Sampling()), Sampler(impossible, stop_ids=frozenset({5})), Sampler(Sampling(1.0, seed=1))]
    tokens, failed = draw(torch.randn(3, 8), samplers)
    assert failed == [None, ErrorKind.RULED_OUT, None] and len(tokens) == 3


def test_logprobs_sum_to_one():
    (entry,) = logprobs(torch.randn(1, 6), [2], 6)
    assert sum(torch.tensor(p).exp() for _, p in entry.top) == pytest.approx(1) and dict(entry.top)[2] == entry.logprob


class Cache:
    """The part of transformers' paged cache that attention touches, over one layer."""

    def __init__(self, blocks, page, heads, dim):
        self.k, self.v = torch.randn(2, blocks * page, heads, dim)
        self._kv_token_views = {0: (self.k, self.v)}
        self.layer_to_allocator = {0: self}

    def update(self, key_states, value_states, layer_idx, kwargs):
        self.k[kwargs["write"]], self.v[kwargs["write"]] = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)


@pytest.mark.parametrize("threads", [1, 2])
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2, 5, 9])), min_size=1, max_size=6),
    st.sampled_from([(4, 4), (4, 2)]),
)
def test_paged_attention_is_attention_request_by_request(threads, shapes, heads):
    page, dim, (heads_q, heads_k) = 4, 8, heads
    cache = Cache(80, page, heads_k, dim)
    free = torch.randperm(80, generator=torch.Generator().manual_seed(len(shapes))).tolist()
    segments, start, write = [], 0, []
    for past, queries in shapes:
        blocks = [free.pop() for _ in range(-(-(past + queries) // page))]
        segments.append(Segment(start, queries, past, blocks))
        start += queries
        write += [blocks[j // page] * page + j % page for j in range(past, past + queries)]
    q = torch.randn(1, heads_q, start, dim)
    k, v = torch.randn(2, 1, heads_k, start, dim)
    cache.moe_prism_layout = plan(segments, page, page)
    with (
        mock.patch("torch.get_num_threads", return_value=threads),
        mock.patch("moe_prism.serve.engine.paged_attention.WORTH_A_THREAD", 0),
    ):
        out, _ = attention(
            SimpleNamespace(layer_idx=0), q, k, v, None, scaling=0.3, cache=cache, write=torch.tensor(write), **{CACHE: cache}
        )
    for s in segments:
        rows = [s.blocks[j // page] * page + j % page for j in range(s.total)]
        keys, values = (c[rows].repeat_interleave(heads_q // heads_k, 1).transpose(0, 1) for c in (cache.k, cache.v))
        span = slice(s.start, s.start + s.queries)
        scores = q[0, :, span] @ keys.transpose(1, 2) * 0.3
        scores += torch.full_like(scores, float("-inf")).triu(s.past + 1)
        assert torch.allclose(out[0, span].transpose(0, 1), scores.softmax(-1) @ values, atol=1e-5)


def nothing_refused(point):
    return None


def test_a_ladder_climbs_in_cost_and_quality():
    rows = [("a", 0.5, 8, 0.9), ("b", 0.25, 4, 0.8), ("c", 0.6, 9, 0.85), ("d", 0.9, 15, 1.0)]
    points = [Level(name, FULL.with_budget(budget), slots, quality) for name, budget, slots, quality in rows]
    assert [level.name for level in climb(points, 16).levels] == ["b", "a", "full"]
    assert [level.name for level in climb([], 16).levels] == ["full"]


def test_levels_come_from_the_frontier_first(tmp_path):
    assert find_ladder(tmp_path, 16, nothing_refused) == (None, "")
    (tmp_path / "ladder.json").write_text(json.dumps({"levels": [{"name": "x", "budget": 0.5, "slots": 8.0, "quality": 0.9}]}))
    ladder, source = find_ladder(tmp_path, 16, nothing_refused)
    assert source == "ladder.json" and [level.name for level in ladder.levels] == ["x", "full"]
    point = {
        "ppl": 2.0,
        "kl": 0.1,
        "active_expert_params": 1.0,
        "active_expert_bytes": 1.0,
        "flops_per_token": 1.0,
        "pareto": True,
    }
    points = [{**point, "name": f"{rule}-{k}", "rule": rule, "budget": k / 16, "k_slots": float(k), "top1_agreement": 0.8 + k / 100}
              for rule in ("threshold", "product") for k in (4, 8)]  # fmt: skip
    frontier = {"model": "m", "source": "s", "n_sub": 4, "points": points, "baseline_topk": [], "provenance": {}}
    (tmp_path / "frontier.json").write_text(json.dumps(frontier))
    ladder, source = find_ladder(tmp_path, 16, nothing_refused)
    assert source == "frontier.json" and [level.name for level in ladder.levels] == ["threshold-4", "threshold-8", "full"]
    (tmp_path / "frontier.json").unlink()
    (tmp_path / "ladder.json").write_text("{}")
    with pytest.raises(CorruptError, match="'levels' is missing; delete it; it is measured again"):
        find_ladder(tmp_path, 16, nothing_refused)
    level = {"name": "x", "budget": 0.5, "slots": 8.0, "quality": 0.9}
    bad = [
        {"slots": -3.0},
        {"budget": 0.0},
        {"budget": -1.0},
        {"quality": -1.0},
        {"quality": None},
        {"name": None},
        {"name": "a\r\nb"},
    ]
    bad += [{"name": "full"}, {"more": 1}]
    for rows in [[{**level, **change}] for change in bad] + [
        [level, level],
        [{**level, "name": f"l{i}"} for i in range(100_000)],
    ]:
        (tmp_path / "ladder.json").write_text(json.dumps({"levels": rows}))
        with pytest.raises(CorruptError) as found:
            find_ladder(tmp_path, 16, nothing_refused)
        assert "\n" not in str(found.value)


def test_a_measured_ladder_is_kept_beside_the_model_and_known_to_verify(elastic_nano, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(elastic_nano, folder)
    model, tokenizer = load(folder)
    measured = measure_ladder(model, tokenizer, folder, tokens=1024)
    assert len(measured) > 3
    assert find_ladder(folder, slots_per_token(model._moe_prism), nothing_refused) == (measured, "ladder.json")
    verify(folder)


def test_one_core_is_left_to_the_server(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert compute_threads(None) == 3
    assert compute_threads(8) == 8
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # OMP_NUM_THREADS=1
    assert compute_threads(None) == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    assert compute_threads(None) == 1


def test_config_of_the_documentation_is_read(tmp_path):
    path = tmp_path / "qos.yaml"
    path.write_text("classes: {chat: {min_quality: 0.9, ttft_ms: 400}}\nengine: {requests: 8}\nnames: {good: 0.95}\n")
    config = load_config(path)
    assert config.default_class == "chat" and config.classes["chat"].ttft == 0.4
    assert config.queue_requests == 32 and config.names == {"good": 0.95}


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ([], "not a mapping"),
        ({"polcy": "x"}, "did you mean 'policy'"),
        ({"bounds": {"body_bites": 3}}, "did you mean 'body_bytes'"),
        ({"bounds": {"n": 17}}, "bounds.n"),
        ({"engine": {"requests": "many"}}, "engine.requests"),
        ({"default_class": "royal"}, "no class"),
        ({"classes": {"a": {"ttft": 3}}}, "no field 'ttft'"),
    ],
)
def test_config_errors_name_the_key(data, cause):
    with pytest.raises(UsageError, match=cause):
        read_config(data)


@given(
    st.lists(
        st.tuples(st.sampled_from(["interactive", "standard", "batch"]), st.integers(1, 9), st.integers(1, 900)), max_size=60
    )
)
def test_the_door_counts_exactly_and_never_passes_its_bounds(visits):
    refused = []
    door = Door(Config(engine={"requests": 8}), rate=1000.0, refused=refused.append)
    places = []
    for i, (kind, requests, tokens) in enumerate(visits):
        try:
            places.append(door.enter(requests, tokens, door.config.classes[kind]))
        except Refusal as refusal:
            assert refusal.status == 503 and refusal.retry >= 1
        assert door.requests == sum(p.requests for p in places if not p.left) <= door.bound_requests
        if i % 3 == 2 and places:
            places[i % len(places)].leave()
            places[i % len(places)].leave()
    for place in places:
        place.leave()
    assert (door.requests, door.tokens) == (0, 0)


@pytest.mark.parametrize(("kind", "most"), [("interactive", 40), ("standard", 32), ("batch", 32)])
def test_what_can_never_enter_is_not_told_to_come_again(kind, most):
    door = Door(Config(engine={"requests": 8}), rate=1000.0, refused=str)
    of = door.config.classes[kind]
    with pytest.raises(Refusal, match=f"n x prompts is {most + 1}, class '{kind}' may hold {most} .*; send fewer") as found:
        door.enter(most + 1, 1, of)
    assert (found.value.status, found.value.param, door.requests) == (400, "n", 0)
    door.enter(most, 1, of)
    with pytest.raises(Refusal) as found:
        door.enter(1, 1, of)
    assert found.value.status == 503


@pytest.mark.parametrize(("fields", "bound"), [({}, math.inf), ({"ttft_ms": 2000}, 8000), ({"ttft_ms": 1}, 4096)])
def test_waiting_tokens_are_bounded_by_the_shortest_target(fields, bound):
    config = read_config({"classes": {"only": fields}, "default_class": "only"})
    assert Door(config, rate=1000.0, refused=str).bound_tokens == bound
    given = read_config({"classes": {"only": fields}, "bounds": {"queue_tokens": 7}})
    assert Door(given, rate=1000.0, refused=str).bound_tokens == 7
