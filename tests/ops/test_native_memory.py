"""The kernels with too little memory: an error, and not the end of the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("hf_topkast.ops.cpu", reason="the C++ extension is not built", exc_type=ImportError)

# Each product under limits that grow until it succeeds. It prints how often the kernels failed, and whether they give
# the same result twice afterwards.
SCRIPT = """
import resource, torch
from concurrent.futures import ThreadPoolExecutor
from hf_topkast.ops import cpu
from hf_topkast.storage.pattern import Pattern

small = Pattern.from_masks(torch.ones(16, 16, dtype=torch.bool), torch.ones(16, 16, dtype=torch.bool))

def failures(run):
    # First what the loader makes when a thread first comes by, or first throws: without memory it ends the process.
    torch.set_num_threads(2)
    (torch.ones(2**20) + 1).sum()
    cpu.forward(torch.ones(8, 16), torch.ones(256), small, None)
    try:
        torch.empty(-1)
    except RuntimeError:
        pass
    count = 0
    for spare in range(2**18, 2**26, 2**18):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
        try:
            run()
        except MemoryError:
            count += 1
        except RuntimeError:  # torch's own allocation
            pass
        else:
            break
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return count

shape = (96, 12000)
backward = torch.rand(shape) < 0.02
pattern = Pattern.from_masks(backward & (torch.rand(shape) < 0.5), backward)
values = torch.randn(pattern.stored)
for tokens in (32, 512):
    x, dy = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
    for run in (
        lambda: cpu.forward(x, values, pattern, None),
        lambda: cpu.grad_input(dy, values, pattern),
        lambda: cpu.grad_values(dy, x, pattern),
    ):
        with ThreadPoolExecutor(1) as fresh:  # whose kernels keep no memory from before
            count = fresh.submit(failures, run).result()
        print(count, torch.equal(run(), run()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much memory a process has")
def test_too_little_memory():
    # Every array of some size is asked of the system, and none found in what was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [line.split() for line in done.stdout.splitlines()]
    assert len(results) == 6
    assert all(int(failures) > 0 and equal == "True" for failures, equal in results), results
