"""An engine that outlives its process: how often it is started again, and what its clients see meanwhile."""

from __future__ import annotations

import asyncio
import socket
from itertools import pairwise

import pytest

from moe_prism.errors import PrismError
from moe_prism.serve.backend import Gauges
from moe_prism.serve.process import supervisor
from moe_prism.serve.process.messages import Link, News, Start
from moe_prism.serve.process.supervisor import Supervisor, Watch
from tests.serve.test_remote import FACTS, request, until

START = Start("model", {}, None, "{}", None)


class Process:
    """A process that the test plays. fails: raised instead of coming up."""

    def __init__(self, fails=None, facts=FACTS):
        ours, theirs = socket.socketpair()
        self.link, self.other = Link(ours), Link(theirs)
        self.fails, self.facts, self.pid, self.ended = fails, facts, id(self), False

    def ready(self):
        if self.fails:
            raise self.fails
        return self.facts

    def outcome(self):
        return "was killed by signal 9"

    def kill(self):
        self.ended = True
        self.link.socket.close()
        self.other.socket.close()

    stop = kill


def play(scene, *following, monkeypatch, pause=0.0):
    """Run `scene(engine, processes)`; processes are those that are spawned, `following` what each does."""
    monkeypatch.setattr(supervisor, "PAUSES", (pause,) * 5)
    plan, spawned = list(following), []

    def spawn(start):
        assert start.cost == FACTS.cost
        spawned.append(plan.pop(0))
        return spawned[-1]

    first = Process()
    engine = Supervisor(START, first, FACTS, 1.0, spawn)

    async def run():
        await engine.attach()
        try:
            await scene(engine, [first, *following])
        finally:
            await engine.detach()

    asyncio.run(run())
    engine.stop()
    return engine, spawned


def test_the_next_engine_takes_over(monkeypatch):
    tallies, heard = [], []

    async def scene(engine, processes):
        engine.observer = tallies.append
        engine.submit(request("a", heard))
        processes[0].other.send(News(1.0, Gauges(failed_steps=2)))
        await until(lambda: engine.gauges().failed_steps == 2)
        processes[0].other.end()
        await until(lambda: heard)
        assert heard[0].error == "the engine stopped" and engine.state == "restarting"
        with pytest.raises(PrismError, match="has stopped"):
            engine.submit(request("b", heard))
        await until(lambda: engine.alive)
        assert engine.state == "ready" and engine.pid == processes[1].pid and processes[0].ended
        engine.submit(request("b", heard))
        assert processes[1].other.receive().job.id == "b"
        assert engine.gauges() == Gauges(failed_steps=2, restarts=1)

    engine, spawned = play(scene, Process(), monkeypatch=monkeypatch, pause=0.3)  # else it may be ready before it is looked at
    assert len(spawned) == 1 and engine.ended() is None


def test_five_tries_and_no_more(monkeypatch, caplog):
    bad = [Process(PrismError("no memory")) for _ in range(3)]

    async def scene(engine, processes):
        processes[0].other.end()
        await until(lambda: engine.alive and engine.pid == processes[4].pid)  # the fourth try comes up
        processes[4].other.end()  # and dies at once
        await until(lambda: engine.pid == processes[5].pid and engine.alive)
        processes[5].other.end()
        await until(lambda: engine.ended())
        assert engine.state == "stopped"

    engine, spawned = play(scene, *bad, Process(), Process(), monkeypatch=monkeypatch)
    assert len(spawned) == 5 and all(p.ended for p in spawned)
    assert engine.ended() == "the engine's process was killed by signal 9; it was started again 5 times and did not stay"
    assert "no memory" not in "".join(str(vars(r).get("fields")) for r in caplog.records)


def test_an_engine_that_was_well_for_long_has_all_tries_again(monkeypatch):
    monkeypatch.setattr(supervisor, "HEALTHY", -1.0)

    async def scene(engine, processes):
        for before, after in pairwise(processes):
            before.other.end()
            await until(lambda after=after: engine.alive and engine.pid == after.pid)

    engine, spawned = play(scene, *[Process() for _ in range(8)], monkeypatch=monkeypatch)
    assert len(spawned) == 8 and engine.ended() is None


def test_a_folder_that_has_changed_is_not_served(monkeypatch):
    changed = [Process(facts=FACTS._replace(vocabulary=7)) for _ in range(5)]

    async def scene(engine, processes):
        processes[0].other.end()
        await until(lambda: engine.ended())

    engine, spawned = play(scene, *changed, monkeypatch=monkeypatch)
    assert len(spawned) == 5 and "5 times" in engine.ended()


def test_time_in_which_nobody_looked_is_no_hanging():
    """A machine that was suspended stops the one who looks and the engine alike."""
    watch = Watch()
    assert [watch.still(5.0, now) for now in (5.0, 5.5, 6.0)] == [0.0, 0.5, 1.0]
    assert watch.still(5.0, 1000.0) == 1.0 + supervisor.LOOKS
    assert watch.still(1000.1, 1000.2) == 0.0 and watch.still(1000.1, 1000.7) == pytest.approx(0.5)
