#!/usr/bin/env bash
# torch 2.13.0 on CPUs: a second thread that has computed once, and never does again, puts the workers of all others to sleep.
#
# A good engineer who serves a model loads it and warms it up on the main thread, and gives the engine a thread of its own:
# only one of them computes at a time, so nothing is lost. But every thread that opens a parallel region of OpenMP gets a
# pool of its own, whose workers live as long as the thread. GNU's OpenMP, which torch's wheels bring, counts all workers
# of the process. While there are more of them than CPUs it takes the machine for oversubscribed: at every barrier a worker
# spins a hundred times instead of 300,000 and then sleeps until the kernel wakes it (libgomp: gomp_throttled_spin_count_var
# in env.c, do_spin in config/linux/wait.h).
#
# Seen (2 CPUs, OMP_NUM_THREADS=2), voluntary context switches for each product [32, 1024] x [1024, 1024] on a thread:
#     the main thread has not computed           about 0.05
#     the main thread has made one exp() before  about 4
# In a decode step of small layers that is a hundred, and some per cent of its time. So: load on a thread that ends, or on
# the one that computes. Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cat > "$folder/pools.py" <<'PYTHON'
import os
import resource
import sys
import threading

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import torch  # noqa: E402  after the affinity: its OpenMP counts the CPUs when it is loaded

PRODUCTS = 300


def compute(found: list[float]) -> None:
    a, b = torch.randn(32, 1024), torch.randn(1024, 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(PRODUCTS):
        a @ b
    found.append((resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before) / PRODUCTS)


if sys.argv[1] == "two":
    torch.ones(1 << 20).exp()  # large enough for a parallel region
found: list[float] = []
thread = threading.Thread(target=compute, args=(found,))
thread.start()
thread.join()
print(f"{found[0]:.2f}")
PYTHON
export OMP_NUM_THREADS=2
one=$("$folder/venv/bin/python" "$folder/pools.py" one)
two=$("$folder/venv/bin/python" "$folder/pools.py" two)
echo "voluntary context switches for each product: $one when one thread has computed, $two when two have"
awk -v one="$one" -v two="$two" 'BEGIN { exit !(one < 1 && two > 2) }'
