"""Budgets that hold: against a reference by hand, and for a request whatever happens around it."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.artefact.load import load
from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.control import HeldRows, Holding, Past, States, keep_held
from moe_prism.elastic.paged_past import PagedStates, RequestSpan
from moe_prism.elastic.sequences import BESIDE
from moe_prism.errors import UsageError
from moe_prism.frontier.cost import measured_cost
from moe_prism.kernels.selection import HORIZON, HORIZON_AT_START, MOST_MOVED, PRIOR, carry
from moe_prism.point import FULL, OperatingPoint, SlotRule
from tests.parity.families import build

HALF, QUARTER = FULL.with_budget(0.5), FULL.with_budget(0.25)
K, N, Q = 2, 3, 129


def at(table, position):
    place = min(max(position, 0.0), 1.0) * (len(table) - 1)
    low = int(place)
    return float(table[low]) + (place - low) * (float(table[min(low + 1, len(table) - 1)]) - float(table[low]))


def by_hand(values, cutoffs, dials, holdings):
    """keep [L, T, k, N] of one request: values [L, T, k, N], cutoffs [L, Q], a dial per token [T]; the formula of `elastic.control`."""
    keep = np.zeros(values.shape, bool)
    more = np.zeros(values.shape[1])  # kept than asked for by every token, over the layers so far
    for layer, holding in enumerate(holdings):
        total, learned = 0.0, 0.0
        for t, dial in enumerate(dials):
            share, asked = at(holding.tables[0], dial), at(holding.tables[1], dial)
            moved = learned - total / (HORIZON * t + HORIZON_AT_START)
            moved = min(max(moved, -MOST_MOVED), MOST_MOVED)
            odds = dial / (1 - dial) * math.exp(moved)
            flat = values[layer, t].ravel()
            wanted = flat >= at(cutoffs[layer], odds / (1 + odds))
            wanted[flat.argmax()] = True
            if holding.strict:
                most = max(1, int((share - more[t] / holding.weight) * flat.size + 1e-4))
                best = np.argsort(-np.where(wanted, flat, -1), kind="stable")[:most]
                wanted &= np.isin(np.arange(flat.size), best)
            keep[layer, t] = wanted.reshape(K, N)
            more[t] += holding.weight * (wanted.sum() / flat.size - share)
            total += more[t] / asked
            learned = min(max(learned - more[t] / (asked * (t + PRIOR)), -MOST_MOVED), MOST_MOVED)
    return keep


def layers_of(strict, rng):
    shares = np.sort(rng.random((2, Q)).astype(np.float32), axis=1)
    return [
        Holding(np.stack([share, 0.1 + rng.random(Q).astype(np.float32)]), w, strict)
        for share, w in zip(shares, (0.4, 0.6), strict=True)
    ]


@given(seed=st.integers(0, 10_000), strict=st.booleans())
@settings(max_examples=40, deadline=None)
def test_compiled_equals_the_formula_however_requests_are_cut_and_mixed(seed, strict):
    rng = np.random.default_rng(seed)
    holdings, requests, length = layers_of(strict, rng), 3, 14
    values = rng.random((2, requests, length, K, N)).astype(np.float32)
    cutoffs = np.sort(rng.random((2, Q)).astype(np.float32), axis=1)[:, ::-1].copy()
    dials = rng.uniform(0.1, 0.9, (requests, length)).astype(np.float32)
    states, found = States(requests * length, 2), np.zeros(values.shape, bool)
    done = [0] * requests
    while min(done) < length:  # steps of some tokens of some requests, in any order
        rows, members = [], []
        for r in rng.permutation(requests):
            count = min(int(rng.integers(0, 6)), length - done[r])
            for t in range(done[r], done[r] + count):
                rows.append((r * length + t - 1 if t else -1, r * length + t, 1))
                members.append((r, t))
            done[r] += count
        if not rows:
            continue
        past = Past(np.array(rows, np.int64).T.copy(), states)
        carry(past.rows, states.sums, states.tokens)
        r, t = np.array(members).T
        for layer, holding in enumerate(holdings):
            keep, _ = keep_held(
                torch.from_numpy(values[layer, r, t]), torch.from_numpy(cutoffs[layer]), torch.from_numpy(dials[r, t]),
                torch.ones(len(r), K, dtype=torch.bool), HeldRows(past, holding, layer, 1).arrays,
            )  # fmt: skip
            found[layer, r, t] = keep.numpy()
    for r in range(requests):
        assert np.array_equal(found[:, r], by_hand(values[:, r], cutoffs, dials[r].tolist(), holdings))


@pytest.fixture(scope="module")
def nano(elastic_nano):
    return load(elastic_nano)


@pytest.fixture(scope="module")
def prompts(nano, text_file):
    """Two requests [1, 160] of one text."""
    ids = nano[1](text_file.read_text()[2000:6000], return_tensors="pt")["input_ids"]
    return ids[:, :160], ids[:, 200:360]


@torch.no_grad()
def spent(model, step, **given):
    """(bytes read as a share of full, kept [L][T, k, N], output) of one forward."""
    elastic, kept = model._moe_prism, []
    with elastic.at(step), elastic.count(), pytest.MonkeyPatch.context() as patch:
        for layer in elastic.layers:
            settle = layer.executor.settle
            patch.setattr(layer.executor, "settle", lambda c, settle=settle: kept.append(settle(c)) or kept[-1])
        out = model(**given)
        read = measured_cost(elastic, step).active_expert_bytes
        full = sum(float(layer.prices(step.bound.groups[0]).bytes["blocks"][0].sum()) * elastic.k for layer in elastic.layers)
    return read / full, [settled.keep for settled in kept], out


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.25])
def test_every_request_reads_what_was_asked_for(nano, prompts, budget):
    """On its own text and on prose, where the cutoffs of the calibration text alone are far off."""
    model, tokenizer = nano
    prose = tokenizer(
        "The quick brown fox jumps over the lazy dog, and nobody minds; it was there before us. " * 9, return_tensors="pt"
    )
    held, alone = (Step(bind(model._moe_prism, [FULL.with_budget(budget, control=control)])) for control in ("mean", "none"))
    for ids in (*prompts, prose["input_ids"][:, :160]):
        assert abs(spent(model, held, input_ids=ids)[0] / budget - 1) < 0.03
    assert abs(spent(model, alone, input_ids=ids)[0] / budget - 1) > 0.03


def test_strict_caps_every_token(nano, prompts):
    model, _ = nano
    elastic = model._moe_prism
    step = Step(bind(elastic, [FULL.with_budget(0.5, control="strict")]))
    read, kept, _ = spent(model, step, input_ids=prompts[0])
    group = step.bound.groups[0]
    share = sum(h.weight * at(h.tables[0], group.budgets[0][0]) for h in group.holding)
    per_token = sum(keep.flatten(1).sum(1) for keep in kept)
    assert int(per_token.max()) <= share * len(kept) * kept[0][0].numel()
    assert 0.45 < read <= 0.5


@torch.no_grad()
def test_a_prompt_in_pieces_and_a_batch_with_padding_change_nothing(nano, prompts):
    model, _ = nano
    for point in (HALF, FULL.with_budget(0.5, control="strict")):
        with operating_point(model, point=point):
            whole = [model(input_ids=ids).logits[0] for ids in prompts]
            out, pieces = None, []
            for begin, end in ((0, 70), (70, 71), (71, 90), (90, 160)):
                out = model(input_ids=prompts[0][:, begin:end], past_key_values=out and out.past_key_values, use_cache=True)
                pieces.append(out.logits[0])
            torch.testing.assert_close(torch.cat(pieces), whole[0], rtol=1e-4, atol=1e-4)
            ids = torch.cat([torch.cat([torch.zeros(1, 37, dtype=torch.long), prompts[1][:, :123]], 1), prompts[0]])
            mask = torch.ones_like(ids)
            mask[0, :37] = 0
            both = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(both[1], whole[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[0, 37:], whole[1][:123], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_known_of_a_request_goes_where_its_cache_goes(nano, prompts):
    """Rows that are copied, chosen, cropped, and a copy of a cache: each goes on as the request it came from."""
    model, _ = nano
    ids = prompts[0]
    with operating_point(model, point=HALF):
        expected = model(input_ids=ids).logits[0, 100:]
        both = model(input_ids=torch.cat([ids[:, :120], prompts[1][:, :120]]), use_cache=True).past_key_values
        both.crop(-20)
        assert both.get_seq_length() == 100
        again = copy.deepcopy(both)
        both.reorder_cache(torch.tensor([1, 0]))
        both.batch_select_indices(torch.tensor([1]))
        both.batch_repeat_interleave(2)
        found = model(input_ids=ids[:, 100:].expand(2, -1), past_key_values=both, use_cache=True).logits
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)
        found = model(input_ids=torch.cat([ids, prompts[1]])[:, 100:], past_key_values=again, use_cache=True).logits
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
        assert again.__dict__[BESIDE].length == 160


@torch.no_grad()
def test_tokens_of_other_points_in_between_do_not_count(nano, prompts):
    """Full ones and those of a rule that holds nothing: the held tokens of a request go on where the last held one was."""
    model, _ = nano
    elastic, ids = model._moe_prism, prompts[0]
    points = [HALF, FULL, FULL.with_budget(0.5, "product")]
    which = torch.zeros(160, dtype=torch.long)
    which[40:60], which[80:90], which[91] = 1, 2, 1
    with elastic.at(Step(bind(elastic, points), which)):
        whole = model(input_ids=ids).logits
    out = None
    for begin, end in ((0, 50), (50, 85), (85, 92), (92, 160)):
        with elastic.at(Step(bind(elastic, points), which[begin:end])):
            out = model(input_ids=ids[:, begin:end], past_key_values=out and out.past_key_values, use_cache=True)
    torch.testing.assert_close(out.logits, whole[:, 92:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_request_cannot_have_two_kinds_at_once(nano, prompts):
    model, _ = nano
    points, which = [HALF, FULL.with_budget(0.5, control="strict")], torch.arange(160) % 2
    with operating_point(model, point=points, which=which), pytest.raises(UsageError, match="two kinds of point"):
        model(input_ids=prompts[0])


@torch.no_grad()
def test_a_layer_alone_takes_every_row_for_a_first_token(nano):
    model, _ = nano
    elastic = model._moe_prism
    layer = elastic.layers[2]
    g = torch.Generator().manual_seed(0)
    x, index = torch.randn(40, layer.parts.layer.hidden, generator=g), torch.rand(40, 32, generator=g).topk(4, 1).indices
    weight = torch.rand(40, 4, generator=g)
    with operating_point(model, point=HALF):
        together = layer(x, index, weight)
        alone = [layer(x[t : t + 1], index[t : t + 1], weight[t : t + 1]) for t in range(40)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)


def test_places_of_pages():
    class Held:
        bound = SimpleNamespace(holds_several=False)

        def kinds(self, tokens):
            return np.ones(tokens, np.int64)

    paged = PagedStates(4, 2)
    past = paged.past(Held(), [RequestSpan(0, 2, [7]), RequestSpan(3, 3, [5, 2]), RequestSpan(8, 1, [1, 2, 0])])
    assert past.rows[0].tolist() == [-1, 28, 22, 23, 8, 11] and past.rows[1].tolist() == [28, 29, 23, 8, 9, 0]
    assert len(paged.states.tokens) >= 30


def test_bytes_of_a_rule_that_counts_slots_are_an_upper_bound(nano, prompts):
    model, _ = nano
    for budget in (0.75, 0.5, 0.25):
        slots = replace(FULL.with_budget(budget, "product").slots, of="bytes")
        step = Step(bind(model._moe_prism, [OperatingPoint(slots=slots)]))
        read, kept, _ = spent(model, step, input_ids=prompts[0])
        assert budget - 1 / 16 < read <= budget
        assert len({int(n) for keep in kept for n in keep.flatten(1).sum(1)}) == 1


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (SlotRule(budget=0.05), "budget 0.05 is less than choosing a token's slots and keeping one reads"),
        (
            SlotRule(budget=0.5, rule="product", control="mean"),
            "rule 'product' has no 'mean' for 'control' of its budget; choose one of: none",
        ),
        (SlotRule(budget=0.5, rule="mass", of="bytes"), "rule 'mass' has no 'bytes' for 'of'"),
    ],
)
def test_refusals(nano, slots, words):
    with pytest.raises(UsageError, match=words):
        bind(nano[0]._moe_prism, [OperatingPoint(slots=slots)])


def test_an_artefact_of_before_says_what_to_do():
    model = build("olmoe")
    width = model.config.hidden_size + 1
    side = [{"ridge": torch.zeros(8, 4, width), "cutoffs": torch.linspace(1, 0, Q)} for _ in model.model.layers]
    elastic = attach(model, 4, tensors=side)
    with pytest.raises(UsageError, match=r"refactor it again, or give a share of the slots with control 'none'"):
        bind(elastic, [HALF])
    bind(elastic, [FULL.with_slots(0.5)])
