"""Closing a round of P = 512 directions over d = 1e6 parameters: seconds, and memory beyond theta.

Baseline: the same sum, one regenerated direction at a time, as MeZO's replay does it. Memory is the
kernel's high-water mark of a process of its own.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from shared import directions
from shared.adapter import Adapter, term
from shared.codec import encode_manifest
from shared.messages import Block, Commit, Manifest, Variant
from tests.bench.figure import Figure

D, P, SEED = 10**6, 512, 7


async def figures() -> list[Figure]:
    seconds = [_measured("ours") for _ in range(5)]
    baseline = _measured("one_at_a_time")
    extra = max(_measured("memory") for _ in range(3))
    plain = _measured("memory_one_at_a_time")
    return [
        Figure("close.seconds", statistics.median(seconds), "s", baseline, target=0.15),
        Figure("close.extra_mb", extra, "MB", plain, target=16),
    ]


def _measured(what: str) -> float:
    command = [sys.executable, "-m", "tests.bench.close", what]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(out.stdout))


def _adapter() -> Adapter:
    manifest = Manifest(
        epoch=0,
        architecture="llama",
        seed=SEED,
        blocks=[Block("control", "l_out-1", [D], layer=1)],
        variants=[Variant("a" * 64, 1, "x")],
        d=D,
    )
    return Adapter(encode_manifest(manifest))


def _commit() -> Commit:
    values = np.random.default_rng(0).integers(-(2**16), 2**16, P)
    return Commit(0, [term(1, (0, 1), [(0, P)], values)])


def _high_water_mb() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("close.extra_mb needs Linux's /proc")


def _child(what: str) -> float:
    adapter, commit = _adapter(), _commit()
    adapter.digest()
    small = Adapter(encode_manifest(adapter.manifest))  # so that imports and pages are warm
    del small
    before = _high_water_mb()
    began = time.perf_counter()
    if what.endswith("one_at_a_time"):
        total = np.zeros(D, np.int64)
        values = np.frombuffer(commit.terms[0].coefficients, "<i4")
        for index in range(P):
            direction = directions.one(SEED, 1, index, 0, D, "signs")
            total += int(values[index]) * direction.astype(np.int64)
    else:
        adapter.after(1, commit).digest()
    seconds = time.perf_counter() - began
    return _high_water_mb() - before if what.startswith("memory") else seconds


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1])))
