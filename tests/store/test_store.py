"""The store computes what the in-memory model computes, at every size, whatever is resident."""

from __future__ import annotations

import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.elastic import operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.errors import UsageError
from moe_prism.jobs.generate import generate
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.offload import CacheCounts
from moe_prism.options.generate import GenerateOptions
from moe_prism.point import FULL, OperatingPoint, SlotRule
from moe_prism.store.choose_misses import Misses, choose
from tests.store.common import PROMPT, logits, opened, smallest, store_of

SLOTS = (1, 5, 12, 1000)


@pytest.fixture(scope="module")
def tiny(elastic_tiny):
    return load(elastic_tiny)


@pytest.fixture(scope="module")
def ids(tiny):
    return tiny[1](PROMPT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def elastic_dense(shared, tiny_dense, tiny_calibration):
    options = RefactorOptions(calibration=tiny_calibration)
    return shared("elastic-dense", lambda out: refactor(tiny_dense, out, options))


def check_counts(counts: CacheCounts, resident: int) -> None:
    assert counts.requested == counts.hits + counts.misses
    assert counts.misses == counts.loads
    assert counts.loads + counts.prefetched - counts.evictions == resident


@pytest.mark.parametrize("name", ["elastic_tiny", "elastic_half", "elastic_dense"])
def test_logits_are_those_of_the_model_in_memory_at_every_size(name, request, tmp_path, ids):
    folder = request.getfixturevalue(name)
    model, tokenizer = load(folder)
    whole, _ = opened(folder, tmp_path / "p")
    first = {}
    for slots in SLOTS:
        memory = smallest(whole, slots)
        stored, _ = opened(folder, tmp_path / "p", memory)
        store = store_of(stored)
        assert store.slots == min(slots, len(store.space))
        assert store.arena.bytes + memory - slots * store.pack.layout.bytes <= memory
        for budget in (1.0, 0.6):
            found, wanted = logits(stored, ids, budget), logits(model, ids, budget)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
            assert torch.equal(found, first.setdefault(budget, found))  # not even the last bit depends on the size
        text = generate(stored, tokenizer, PROMPT, 0.7, sampling=GenerateOptions(max_tokens=6)).text
        assert text == generate(model, tokenizer, PROMPT, 0.7, sampling=GenerateOptions(max_tokens=6)).text
        check_counts(store.cache.counts, len(store.cache))
        store.close()


def test_nothing_is_read_twice_while_everything_fits(elastic_tiny, tmp_path, ids):
    stored, _ = opened(elastic_tiny, tmp_path / "p")
    logits(stored, ids)
    before = store_of(stored).times.bytes
    logits(stored, ids)
    assert 0 < store_of(stored).times.bytes == before <= len(store_of(stored).space) * store_of(stored).pack.layout.bytes


def test_whole_experts_as_records(elastic_tiny, tiny, tmp_path, ids):
    stored, _ = opened(elastic_tiny, tmp_path / "p", parts=1)
    assert store_of(stored).space.parts == 1
    torch.testing.assert_close(logits(stored, ids), logits(tiny[0], ids), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("policy", ["lru", "lfu", "arc", "fifo", "reuse"])
def test_the_policy_changes_no_logit(elastic_tiny, tiny, tmp_path, ids, policy):
    whole, _ = opened(elastic_tiny, tmp_path / "p")
    stored, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 8), policy=policy)
    assert torch.equal(logits(stored, ids, 0.6), logits(whole, ids, 0.6))


def test_no_expert_is_in_memory(elastic_tiny, tmp_path):
    stored, _ = opened(elastic_tiny, tmp_path / "p")
    experts = [p for name, p in stored.named_parameters() if ".experts." in name]
    assert experts and all(p.is_meta for p in experts)
    assert all(not p.is_meta for name, p in stored.named_parameters() if ".experts." not in name)


@pytest.mark.parametrize("slots", [4, 8, 14])
@pytest.mark.parametrize("budget", [1.0, 0.6])
def test_reading_ahead_changes_no_logit(elastic_tiny, tmp_path, ids, slots, budget):
    whole, tokenizer = opened(elastic_tiny, tmp_path / "p")
    stored, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, slots), ahead=3)
    assert torch.equal(logits(stored, ids[:, :3], budget), logits(whole, ids[:, :3], budget))
    mine = generate(stored, tokenizer, PROMPT, budget, sampling=GenerateOptions(max_tokens=12)).text
    assert mine == generate(whole, tokenizer, PROMPT, budget, sampling=GenerateOptions(max_tokens=12)).text
    store = store_of(stored)
    store.settle()
    assert store.cache.counts.prefetched > 0
    check_counts(store.cache.counts, len(store.cache))
    assert not any(store.fetcher.pool(layer).pinned for layer in range(store.space.layers))


def test_a_layer_that_is_there_lets_the_one_after_it_be_guessed(elastic_tiny, tmp_path, ids):
    """HOBBIT looks on until something is missing, or to its horizon; and no logit changes."""
    whole, _ = opened(elastic_tiny, tmp_path / "p", ahead=2, horizon=9)
    ahead, store, asked = whole._moe_prism.ahead, store_of(whole), []
    last = store.space.layers - 1
    store.prefetch = lambda layer, keys: asked.append(layer)  # nothing is read for the guesses
    x, index = torch.randn(1, 32), torch.tensor([[0, 1]])
    logits(whole, ids[:, :1])
    asked.clear()
    wanted = {number: ahead.keys(number, x, Misses()) for number in range(1, last + 1)}
    kept = store.places.of.copy()
    store.places.of[:] = 0  # everything is there
    ahead(1, x, index)
    assert asked == list(range(1, last + 1))
    asked.clear()
    store.places.of[wanted[1][-1]] = -1  # of the first layer that is guessed, one record is not
    ahead(1, x, index)
    assert asked == [1]
    store.places.of[:] = kept
    far, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 14), ahead=3, horizon=3)
    plain, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 14))
    assert all(torch.equal(logits(far, token), logits(plain, token)) for token in ids[0, :6, None, None])
    store_of(far).settle()


def test_a_floor_keeps_what_lies_between_the_two_budgets(elastic_tiny, tmp_path, ids):
    """Every choice under a floor contains the floor's own and is contained in the budget's."""
    whole, _ = opened(elastic_tiny, tmp_path / "p")
    stored, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 6), misses=Misses(floor=0.3))
    layer, store = stored._moe_prism.layers[1], store_of(stored)
    x = torch.randn(5, 32)
    index, weight = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 1]]), torch.rand(5, 2)
    logits(stored, ids, 0.8)
    for rule in ("product", "threshold"):
        steps = [Step(bind(stored._moe_prism, [FULL.with_slots(b, rule)])) for b in (0.3, 0.8)]
        low, high = (layer.kept(step, x, index, weight) for step in steps)
        candidates = layer.candidates(steps[1], x, index, weight)
        keep = choose(store, 1, candidates, Misses(floor=0.3)).keep
        there = torch.from_numpy(store.resident(1))[index]
        assert torch.equal(keep, (high & there) | (low & ~there))
        mixed = choose(store, 1, candidates, Misses(0.3, low=0.8))
        assert torch.equal(mixed.keep, high)
        assert not (torch.from_numpy(mixed.low)[index] & low & high).any() or not there.all()


@pytest.mark.parametrize("rule", ["product", "threshold"])
@pytest.mark.parametrize("misses", [Misses(), Misses(0.3), Misses(0.2, low=0.6)])
def test_the_choice_of_few_tokens_is_that_of_any_number(elastic_tiny, tmp_path, ids, rule, misses):
    """Kept slots, int8 records and entries; and the guess of what to read ahead. Slot by slot, not close."""
    whole, _ = opened(elastic_tiny, tmp_path / "p", misses=misses)
    stored, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 6), misses=misses, ahead=3)
    logits(stored, ids, 0.8)
    elastic, store = stored._moe_prism, store_of(stored)
    layer = elastic.layers[1]
    for tokens in (1, 2, 7):
        x, weight = torch.randn(tokens, 32), torch.rand(tokens, 2)
        index = torch.rand(tokens, 4).argsort(1)[:, :2]
        for budget in (None, torch.rand(tokens) * 0.9 + 0.1):
            step = Step(bind(elastic, [FULL.with_budget(0.7, rule)]), 0, budget)
            with torch.no_grad(), elastic.at(step):
                candidates = layer.candidates(step, x, index, weight)
                few, many = choose(store, 1, candidates, misses), choose(store, 1, Plain(candidates), misses)
                assert few.prepared is not None and torch.equal(few.keep, many.keep)
                assert (few.low is None) == (many.low is None) and (few.low is None or (few.low == many.low).all())
                assert many.prepared is None and few.prepared.source is weight
                wanted, found = store.wanted(1, index, weight, many.keep), few.prepared.entries
                assert all((getattr(wanted, name) == getattr(found, name)).all() for name in vars(wanted))
                assert elastic.ahead.keys(1, x, misses) == plain_guess(elastic, x, misses)


class Plain:
    """Candidates without their fused form."""

    def __init__(self, candidates):
        self.candidates = candidates

    def __getattr__(self, name):
        return getattr(self.candidates, name)

    def keep(self, most=1.0):
        """The rule on the scorer's norms, whatever the number of tokens."""
        own = self.candidates
        budget = torch.as_tensor(own.budget, dtype=torch.float32).expand(len(own.x)).clamp(max=most)
        return own.rule.keep(own.slots, budget)

    def fused(self, most):
        return None


def plain_guess(elastic, x, misses):
    layer = elastic.layers[1]
    original, layer.candidates = layer.candidates, lambda *batch, **own: Plain(type(layer).candidates(layer, *batch, **own))
    try:
        return elastic.ahead.keys(1, x, misses)
    finally:
        layer.candidates = original


def test_everything_resident_means_no_loss(elastic_tiny, tmp_path, ids):
    stored, _ = opened(elastic_tiny, tmp_path / "p", misses=Misses(floor=0.2))
    whole, _ = opened(elastic_tiny, tmp_path / "p")
    for _ in range(2):
        logits(whole, ids)
        stored._moe_prism.misses, before = Misses(), stored._moe_prism.misses
        logits(stored, ids)
        stored._moe_prism.misses = before
    assert torch.equal(logits(stored, ids, 0.7), logits(whole, ids, 0.7))


def test_int8_records_are_close_and_read_less(elastic_half, tmp_path, ids):
    whole, _ = opened(elastic_half, tmp_path / "p", misses=Misses(0.01, low=1.0))
    exact, _ = opened(elastic_half, tmp_path / "q")
    found, wanted = logits(whole, ids, 0.999), logits(exact, ids, 0.999)
    assert store_of(whole).fetcher.low
    assert not torch.equal(found, wanted)
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    assert float(kl) < 0.01


def test_a_time_per_step_of_zero_is_the_floor_and_of_an_hour_is_everything(elastic_tiny, tmp_path, ids):
    whole, _ = opened(elastic_tiny, tmp_path / "p")
    memory = smallest(whole, 8)
    results = {}
    for seconds in (None, 0.0, 3600.0):
        stored, _ = opened(elastic_tiny, tmp_path / "p", memory, misses=Misses(0.4, step_seconds=seconds))
        logits(stored, ids[:, :4], 0.9)  # a price is known from here on
        results[seconds] = logits(stored, ids[:, 4:9], 0.9)
    assert torch.equal(results[None], results[0.0])
    assert torch.equal(results[3600.0], logits(whole, ids[:, 4:9], 0.9))


SHARES = [(1.0, 1.0), (0.5, 1.0), (0.5, 0.5), (0.0, 0.7), (0.0, 0.0)]


@pytest.mark.parametrize("shares", SHARES)
def test_the_weight_of_stronger_experts_decides_what_is_read(elastic_tiny, tmp_path, ids, shares):
    """HOBBIT's T1 and T2, expert by expert: as it is, in int8 form, or not at all; what is there is used as the budget says."""
    misses = Misses(shares=shares)
    file = tmp_path / ("low" if misses.needs_low else "p")
    stored, _ = opened(elastic_tiny, file, smallest(opened(elastic_tiny, file, misses=misses)[0], 6), misses=misses)
    layer, store = stored._moe_prism.layers[1], store_of(stored)
    x, weight = torch.randn(5, 32), torch.rand(5, 2) + 0.01
    index = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 1]])
    logits(stored, ids, 0.8)
    step = Step(bind(stored._moe_prism, [FULL.with_slots(0.8, "product")]))
    high = layer.kept(step, x, index, weight)
    found = choose(store, 1, layer.candidates(step, x, index, weight), misses)
    there = torch.from_numpy(store.resident(1))[index]
    for t in range(5):
        for c in range(2):
            other = float(weight[t, 1 - c])
            stronger = other / float(weight[t].sum()) if other > weight[t, c] else 0.0
            read = stronger <= shares[1]
            assert torch.equal(found.keep[t, c], high[t, c] & (there[t, c] | read))
            if found.low is not None and stronger <= shares[0]:  # whoever wants it as it is, is given it
                assert not found.low[index[t, c]].any()
    if shares == (1.0, 1.0):
        assert found.low is None and torch.equal(found.keep, high)


def test_smaller_shares_read_less_and_lose_more(elastic_half, tmp_path, ids):
    whole, _ = opened(elastic_half, tmp_path / "p", misses=Misses(shares=(0.0, 1.0)))
    exact, memory, read, lost = opened(elastic_half, tmp_path / "q")[0], smallest(whole, 2), [], []
    tokens = ids[0, :8, None, None]  # one at a time: a batch reads what anybody wants as it is
    wanted = torch.cat([logits(exact, token) for token in tokens])
    for shares in ((1.0, 1.0), (0.6, 0.9), (0.0, 0.9), (0.0, 0.0)):
        stored, _ = opened(elastic_half, tmp_path / "p", memory, misses=Misses(shares=shares))
        found = torch.cat([logits(stored, token) for token in tokens])
        lost.append(float((wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()))
        read.append(store_of(stored).times.bytes)
    assert lost[0] == pytest.approx(0, abs=1e-6) and 0 < lost[2] < lost[3] == max(lost)
    assert read == sorted(read, reverse=True) and read[-1] < read[0]


def test_shares_and_budgets_exclude_each_other():
    for wrong in ({"shares": (0.9, 0.6)}, {"shares": (-0.1, 1.0)}, {"shares": (0.5, 1.1)}, {"floor": 0.5, "shares": (0.5, 1.0)}):
        with pytest.raises(UsageError, match=r"T1 <= T2|both say"):
            Misses(**wrong)


def test_what_a_store_cannot_do(elastic_tiny, tmp_path, ids):
    stored, _ = opened(elastic_tiny, tmp_path / "p")
    oracle = OperatingPoint(slots=SlotRule(budget=0.5, scorer="oracle"))
    with pytest.raises(UsageError, match="oracle"), operating_point(stored, point=oracle):
        stored(input_ids=ids)
    for wrong in (Misses, lambda: Misses(0.0), lambda: Misses(0.5, low=0.2), lambda: Misses(0.5, step_seconds=-1)):
        if wrong is not Misses:
            with pytest.raises(UsageError):
                wrong()


@torch.no_grad()
def test_records_in_int8_form_have_a_price_of_their_own(elastic_tiny, tmp_path, ids):
    """What ran is told by block and form: bytes read per token are those of the records that were taken."""
    from moe_prism.elastic.bind import Step, bind
    from moe_prism.frontier.cost import measured_cost
    from moe_prism.point import FULL

    whole, _ = opened(elastic_tiny, tmp_path / "p", misses=Misses(0.2, low=0.9))
    stored, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 6), misses=Misses(0.2, low=0.9))
    elastic, layout = stored._moe_prism, store_of(stored).pack.layout
    step = Step(bind(elastic, [FULL.with_budget(0.9)]))
    with elastic.at(step), elastic.count():
        stored(input_ids=ids)
        cost = measured_cost(elastic, step)
    low = sum(float(layer.counter.per_token["low"].sum()) for layer in elastic.layers if "low" in layer.counter.per_token)
    assert low > 0
    group, tokens = step.bound.groups[0], elastic.layers[0].counter.tokens
    rest = sum(
        layer.prices(group).total({k: v for k, v in layer.counter.per_token.items() if k != "low"})[1] for layer in elastic.layers
    )
    assert cost.active_expert_bytes == pytest.approx((rest + low * layout.low_bytes) / tokens)
    assert cost.k_slots == pytest.approx(sum(layer.counter.kept for layer in elastic.layers) / tokens / len(elastic.layers))
