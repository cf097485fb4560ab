"""Free memory within the limits of control groups, of both versions, in a made-up /proc and /sys."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_prism import memory

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """4 GiB, 3 of them free; write(group, **files) makes a control group."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  4194304 kB\nMemFree: 1 kB\nMemAvailable:  3145728 kB\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "GROUPS", groups)

    def write(path, **files):
        (groups / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (groups / path / name.replace("__", ".")).write_text(str(text))

    def belongs(line):
        (proc / "self" / "cgroup").write_text(line)

    return write, belongs


def test_without_limits_it_is_the_machine(machine):
    assert memory.available_memory() == 3 << 30 and memory.total_memory() == 4 << 30
    _, belongs = machine
    belongs("0::/nowhere\n")
    assert memory.available_memory() == 3 << 30


def test_the_narrowest_group_around_the_process_counts_and_what_can_be_dropped_is_free(machine):
    write, belongs = machine
    belongs("0::/pod/box\n")
    write("pod/box", memory__max="max", memory__current=900 * MIB)
    write("pod", memory__max=1024 * MIB, memory__current=1000 * MIB, memory__stat=f"anon 1\ninactive_file {300 * MIB}\n")
    assert memory.available_memory() == 324 * MIB and memory.total_memory() == 1024 * MIB


def test_a_container_sees_its_own_group_as_the_root(machine):
    write, belongs = machine
    belongs("0::/system.slice/outside.scope\n")
    write(".", memory__max=512 * MIB, memory__current=100 * MIB)
    assert memory.available_memory() == 412 * MIB


def test_version_1_and_its_number_for_no_limit(machine):
    write, belongs = machine
    belongs("5:cpu:/x\n4:memory:/box\n")
    write(
        "memory/box", memory__limit_in_bytes=256 * MIB, memory__usage_in_bytes=200 * MIB, memory__stat="total_inactive_file 0\n"
    )
    write("memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=1)
    assert memory.available_memory() == 56 * MIB and memory.total_memory() == 256 * MIB


def test_what_a_process_holds():
    assert 1 * MIB < memory.resident_memory() < memory.total_memory()


def test_the_peak_of_a_process_is_not_that_of_who_started_it():
    held = bytearray(512 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    code = "from moe_prism.progress import peak_rss_bytes; print(peak_rss_bytes())"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(said) < len(held)
