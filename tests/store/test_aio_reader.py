"""Reads by the kernel: the same bytes and the same errors as those of threads, also where it takes no more of them."""

from __future__ import annotations

import mmap
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_prism.checkpoint import read_manifest
from moe_prism.store import aio_reader
from moe_prism.store.aio_reader import DEPTH, KernelReader, NoQueue, open_reader
from moe_prism.store.pack import open_pack
from moe_prism.store.reader import RecordReader, is_direct
from moe_prism.store.workers import WorkerReader
from tests.store.common import logits, opened, smallest, store_of

IDS = torch.arange(3, 30)[None]


@pytest.fixture
def setting(elastic_tiny, tmp_path):
    whole, _ = opened(elastic_tiny, tmp_path / "p")
    if not isinstance(store_of(whole).reader, KernelReader):
        pytest.skip("no asynchronous reads here")
    return elastic_tiny, tmp_path / "p", whole


def readers(pack):
    arenas = [torch.frombuffer(mmap.mmap(-1, 64 * pack.layout.bytes), dtype=torch.uint8).view(64, -1) for _ in "ab"]
    return [kind(pack, arena) for kind, arena in zip((KernelReader, WorkerReader), arenas, strict=True)]


def wait(jobs):
    for job in jobs:
        job.wait()
    return {key: reason for job in jobs for key, reason in job.failed.items()}


@pytest.mark.parametrize("ahead", [False, True])
def test_the_same_bytes_as_by_threads(setting, ahead):
    pack = store_of(setting[2]).pack
    both = readers(pack)
    keys = np.array([0, 1, 2, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19])
    slots = np.random.default_rng(0).permutation(64)[: len(keys)]
    for reader in both:
        jobs = reader.read(keys, slots, ahead=ahead)
        assert not wait(jobs) and all(job.done for job in jobs)
        assert sorted(item.key for job in jobs for item in job.items) == keys.tolist() and sum(j.count for j in jobs) == len(keys)
    assert torch.equal(both[0]._arena[slots], both[1]._arena[slots])
    for reader in both:
        reader.close()


def test_more_reads_than_the_queue_is_deep(setting):
    pack = store_of(setting[2]).pack
    reader, other = readers(pack)
    jobs = []
    for turn in range(3 * DEPTH // 8):
        jobs += reader.read(np.arange(0, 16, 2), np.arange(8) + turn % 8 * 8, ahead=turn % 2 == 0)
    assert not wait(jobs)
    assert reader._reads.free[0] == DEPTH and sorted(reader._unused) == list(range(DEPTH)) and not reader._jobs
    reader.close()
    other.close()


def test_what_the_kernel_does_not_take_is_read_at_once(setting):
    pack = store_of(setting[2]).pack
    reader, other = readers(pack)
    context = int(reader._queue.context[0])
    reader._queue.context[0] = 0  # nobody's queue
    jobs = [*reader.read(np.arange(5), np.arange(5)), *reader.read(np.arange(7, 9), np.arange(5, 7), ahead=True)]
    assert all(job.done and not job.failed for job in jobs)
    wait(other.read(np.array([0, 1, 2, 3, 4, 7, 8]), np.arange(7)))
    assert torch.equal(reader._arena[:7], other._arena[:7])
    reader._queue.context[0] = context
    reader.close()
    other.close()


def test_wrong_and_missing_records_are_named(setting):
    _, file, whole = setting
    pack = store_of(whole).pack
    reader, other = readers(pack)
    with file.open("r+b") as handle:
        handle.seek(pack.place(3, False) + 5)
        handle.write(b"\xff\x00\xff")
    os.truncate(file, pack.place(9, False))
    assert wait(reader.read(np.array([2, 3, 4, 8, 9]), np.arange(5))) == {3: "wrong checksum", 9: "the file is cut short"}
    assert set(wait(reader.read(np.array([3, 9]), np.arange(2), ahead=True))) == {3, 9}
    assert not wait(reader.read(np.array([4]), np.arange(1)))
    reader.close()
    other.close()


def test_where_there_is_no_queue_threads_read(setting, monkeypatch):
    pack = open_pack(setting[1], read_manifest(setting[0]))
    arena = torch.zeros(4, pack.layout.bytes, dtype=torch.uint8)
    assert is_direct(pack.path) and not is_direct(pack.path.with_name("absent"))

    def none(*_):
        raise NoQueue

    for change in ({"SMALL_RECORD": 0}, {"CALLS": {}}, {"KernelReader": none}):
        with monkeypatch.context() as m:
            for name, value in change.items():
                m.setattr(aio_reader, name, value)
            reader = open_reader(pack, arena)
            assert type(reader) is WorkerReader
            reader.close()
    monkeypatch.setattr(aio_reader, "setup", lambda *_: -1)
    with pytest.raises(NoQueue):
        KernelReader(pack, arena)
    monkeypatch.setattr(aio_reader, "os", SimpleNamespace(**{k: v for k, v in vars(os).items() if k != "eventfd"}))
    reader = open_reader(pack, arena)
    assert type(reader) is RecordReader
    reader.close()


@pytest.mark.parametrize("policy", ["lru", "lfu", "arc"])
def test_threads_and_kernel_give_the_same_model(setting, policy):
    folder, file, whole = setting
    memory = smallest(whole, 9)
    wanted = logits(whole, IDS, 0.6)
    for reader in (KernelReader, WorkerReader, RecordReader):
        stored, _ = opened(folder, file, memory, reader=reader, policy=policy, ahead=2)
        assert torch.equal(logits(stored, IDS, 0.6), wanted)
        assert torch.equal(logits(stored, IDS[:, :2], 0.6), logits(whole, IDS[:, :2], 0.6))
        store_of(stored).close()


def test_threads_give_back_what_nobody_wants_any_more(setting):
    """Whether a thread has begun a job is chance; either it ends, or it is taken back and its number serves again."""
    reader, worker = readers(store_of(setting[2]).pack)
    for _ in range(5):
        jobs = [worker.read(np.array([key]), np.array([key]), ahead=True)[0] for key in range(16)]
        back = [job for job in jobs if worker.cancel(job)]
        assert not wait([job for job in jobs if job not in back]) and all(job.done for job in jobs)
        assert not any(worker.cancel(job) for job in back)  # not twice
    assert not wait(worker.read(np.arange(8), np.arange(8)))
    for own in (reader, worker):
        own.close()
