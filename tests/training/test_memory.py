"""Memory that a process keeps: no pages are asked for again, and the peak stays."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from vla_bench.training.memory import keep_freed_memory

def usage():
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_minflt, found.ru_maxrss

def steps():
    before = usage()[0]
    for _ in range(5):
        parts = [torch.ones(n * 1_000_000) for n in (1, 3, 12)]
        del parts
    return usage()[0] - before

steps()
before, peak = steps(), usage()[1]
keep_freed_memory()
steps()
print(before, steps(), peak, usage()[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is the GNU C library's")
def test_a_step_touches_no_new_page_and_needs_no_more_at_its_peak():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after, peak, peak_kept = map(int, done.stdout.split())
    assert before > 10_000 and after < 100
    assert peak_kept < 1.1 * peak


def test_another_c_library_is_left_alone(monkeypatch):
    from vla_bench.training import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: pytest.fail("looked for mallopt"))
    assert memory.keep_freed_memory() is False
