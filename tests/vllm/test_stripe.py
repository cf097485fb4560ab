"""Workers with a stripe of every block: by simulation of ranks. Needs no vLLM."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
import torch
from torch.nn.functional import silu

from moe_prism.elastic.bind import Step, bind
from moe_prism.point import FULL
from moe_prism.serve.vllm import stripe
from moe_prism.serve.vllm.layer import PackedElastic, PackedWeights, pack
from moe_prism.serve.vllm.stripe import ALONE, Share

E, K, D, F, N = 5, 3, 32, 256, 4


class Ranks:
    """`size` threads, each a worker that waits for the others where it gathers."""

    def __init__(self, size):
        self.size, self.barrier, self.given = size, Barrier(size), [None] * size

    def gather(self, rank):
        def run(own):
            self.given[rank] = own.clone()
            self.barrier.wait(60)
            found = list(self.given)
            self.barrier.wait(60)
            return found

        return run

    def run(self, work):
        """work(share) of every rank, at once."""
        found, errors = [None] * self.size, []

        def one(rank):
            try:
                found[rank] = work(Share(rank, self.size, self.gather(rank)))
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
                self.barrier.abort()

        threads = [Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        return found


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(E, 2 * F, D, generator=g) / D**0.5, torch.randn(E, D, F, generator=g) / F**0.5


def shard(first, down, rank, size):
    """What vLLM gives a rank: a run of neurons, in its kernel's order."""
    m = F // size
    gate, up = first[:, rank * m : (rank + 1) * m], first[:, F + rank * m : F + (rank + 1) * m]
    local, mine = torch.cat([gate, up], 1).contiguous(), down[:, :, rank * m : (rank + 1) * m].contiguous()
    return pack(local).view(local.shape), pack(mine).view(mine.shape)


def side(gates, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "ridge": (torch.randn(E, N, D + N * gates + 1, generator=g) * 0.2).bfloat16(),
        "cutoffs": torch.linspace(2.0, 0, 129),
        "shares": torch.linspace(0, 1, 129),
        "compensate.mean.vectors": torch.randn(E, N, D, generator=g).bfloat16(),
    }


def elastic(first, down, share, gates, points):
    own = PackedWeights(w13=first, w2=down, activation="silu", share=share)
    made = PackedElastic(torch.nn.Module(), [("experts", own)], [side(gates)], n_sub=N, gates=gates, k=K)
    made.step = Step(bind(made, points), 0)
    return made


def batch(tokens=9, seed=3):
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E, generator=g).topk(K, dim=1).indices
    return torch.randn(tokens, D, generator=g), index, torch.rand(tokens, K, generator=g)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_holds_its_stripe_of_every_block(size, monkeypatch):
    monkeypatch.setattr(stripe, "AT_ONCE", 20_000)  # several exchanges
    first, down = weights()

    def work(share):
        w13, w2 = shard(first, down, share.rank, share.size)
        share.stripe(w13, w2, N)
        return w13, w2

    m = F // N // size
    for rank, (w13, w2) in enumerate(Ranks(size).run(work)):
        ids = torch.cat([torch.arange(n * F // N + rank * m, n * F // N + (rank + 1) * m) for n in range(N)])
        wanted, below = torch.cat([first[:, ids], first[:, F + ids]], 1), down[:, :, ids].contiguous()
        assert torch.equal(w13, pack(wanted).view(wanted.shape)) and torch.equal(w2, pack(below).view(below.shape))


@pytest.mark.parametrize("gates", [0, 2])
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_summed_are_one_worker(size, budget, gates):
    first, down = weights()
    points, (x, index, weight) = [FULL.with_slots(budget)], batch()
    alone = elastic(*shard(first, down, 0, 1), ALONE, gates, points)
    wanted, kept = alone.run(0, x, index, weight), []

    def work(share):
        w13, w2 = shard(first, down, share.rank, share.size)
        share.stripe(w13, w2, N)
        made = elastic(w13, w2, share, gates, points)
        made.layers[0].on_kept = lambda _, keep: kept.append(keep)
        return made.run(0, x, index, weight)

    found = sum(Ranks(size).run(work))
    assert all(torch.equal(kept[0], other) for other in kept[1:]) and not kept[0].all()
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_striped_expert_is_the_expert():
    """At full budget vLLM's own kernel runs on what a rank holds: the sum over ranks is the expert, with neurons in another order."""
    first, down = weights()
    x = batch()[0]

    def work(share):
        w13, w2 = shard(first, down, share.rank, share.size)
        share.stripe(w13, w2, N)
        plain = w13.view(E, -1, D, 16).transpose(2, 3).reshape(E, -1, D)
        below = w2.view(E, -1, F // share.size, 16).transpose(2, 3).reshape(E, D, -1)
        gate, up = torch.einsum("td,efd->etf", x, plain).chunk(2, -1)
        return torch.einsum("etf,edf->etd", silu(gate) * up, below)

    gate, up = torch.einsum("td,efd->etf", x, first).chunk(2, -1)
    wanted = torch.einsum("etf,edf->etd", silu(gate) * up, down)
    assert (sum(Ranks(2).run(work)) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("width", "size", "gates", "words"),
    [
        (128, 2, 0, None),
        (128, 4, 0, "32 neurons do not go to 4 workers in multiples of 16"),
        (192, 3, 0, None),
        (192, 2, 0, "48 neurons do not go to 2"),
        (128, 2, 17, "17 gate neurons of a sub-expert do not fit the 16 neurons"),
    ],
)
def test_what_cannot_be_striped_is_named(width, size, gates, words):
    problem = Share(0, size, lambda own: [own]).problem(width, 4, gates)
    assert problem is None if words is None else words in problem
