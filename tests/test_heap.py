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
