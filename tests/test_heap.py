"""Buffers that were freed leave the process, whatever small ones lie between them."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from threading import Thread
from moe_prism.heap import return_large_buffers

def resident():
    return int(open("/proc/self/statm").read().split()[1]) >> 8

def work():
    for _ in range(3):
        pairs = [(bytearray(b"x") * (2 << 20), bytearray(60_000)) for _ in range(60)]
        kept.extend(small for _, small in pairs)

if sys.argv[1] == "returned":
    return_large_buffers()
kept, before = [], resident()
thread = Thread(target=work)
thread.start()
thread.join()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_buffers_are_returned():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "returned"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, "180 buffers of 2 MiB, 10 MiB of small ones"


HOLES = """
import sys
from moe_prism.heap import return_freed_pages

def resident():
    return int(open("/proc/self/statm").read().split()[1]) >> 8

pairs = [(bytearray(b"x") * 60_000, bytearray(b"x") * 600) for _ in range(2000)]  # below 1 MiB, with something that stays between them
kept, before = [small for _, small in pairs], resident()
del pairs
return_freed_pages()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_between_what_stays_are_returned():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80, "of 114 MiB"
