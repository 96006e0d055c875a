"""A small coverage-guided fuzzer: what reaches a new line is kept, and mutated further.

Source: M. Zalewski, American Fuzzy Lop, technical details (2013): havoc and splicing over a queue
of inputs that found something new. Differs in: lines of Python instead of edges; a run is a
function of its seed and its number of inputs, so a finding repeats.
"""

import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.chaos.abuse.targets import Target

ROOT = str(Path(__file__).resolve().parents[3])
SOURCES = tuple(f"{ROOT}/{folder}/" for folder in ("shared", "services"))
LONGEST_INPUT = 8192
MOST_S = 2.0
"""One input may take so long, on a machine that does other things too."""
MOST_MB = 128.0
"""And so much more memory than all before it."""

Site = tuple[CodeType, int]


@dataclass
class Finding:
    """An input that was not refused as documented, or cost too much."""

    data: bytes
    why: str


@dataclass
class Fuzzed:
    """What a run came to."""

    inputs: int = 0
    sites: set[Site] = field(default_factory=set[Site])
    corpus: list[bytes] = field(default_factory=list[bytes])
    findings: list[Finding] = field(default_factory=list[Finding])
    slowest_s: float = 0.0


def fuzz(target: Target, seed: int, inputs: int, limit_s: float = 1e9) -> Fuzzed:
    """`inputs` runs of `target`, or as many as `limit_s` leaves time for."""
    chance = random.Random(seed)
    result = Fuzzed()
    ends = time.monotonic() + limit_s
    for data in target.seeds:
        _try(target, data, result)
        result.corpus.append(data)
    while result.inputs < inputs and time.monotonic() < ends and len(result.findings) < 5:
        data = _mutated(chance, result.corpus, target)
        if _try(target, data, result):
            result.corpus.append(data)
    return result


def _try(target: Target, data: bytes, result: Fuzzed) -> bool:
    """Whether `data` reached what nothing had reached before."""
    before, known = _peak_mb(), len(result.sites)
    began = time.monotonic()
    why = ""
    try:
        _traced(target.run, data, result.sites)
    except Exception as error:  # noqa: BLE001  whatever is not documented is what we look for
        why = f"{type(error).__name__}: {error}"
    took_s, more_mb = time.monotonic() - began, _peak_mb() - before
    if not why and took_s > MOST_S:
        why = f"took {took_s:.1f} s"
    if not why and more_mb > MOST_MB:
        why = f"took {more_mb:.0f} MB"
    if why:
        result.findings.append(Finding(data, why))
    result.inputs += 1
    result.slowest_s = max(result.slowest_s, took_s)
    return len(result.sites) > known


def _traced(run: Callable[[bytes], None], data: bytes, sites: set[Site]) -> None:
    def lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            sites.add((frame.f_code, frame.f_lineno))
        return lines

    def calls(frame: FrameType, _event: str, _: Any) -> Any:
        return lines if frame.f_code.co_filename.startswith(SOURCES) else None

    outer = sys.gettrace()
    sys.settrace(calls)
    try:
        run(data)
    finally:
        sys.settrace(outer)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _mutated(chance: random.Random, corpus: list[bytes], target: Target) -> bytes:
    newest = corpus[-16:]
    data = bytearray(chance.choice(newest if chance.random() < 0.5 else corpus))
    for _ in range(1 << chance.randrange(5)):
        at = chance.randrange(len(data) + 1)
        size = chance.randrange(1, 17)
        match chance.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at % len(data)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size] * chance.randrange(1, 5)
            case 4:
                data[at:at] = chance.randbytes(size)
            case 5 if target.words:
                word = chance.choice(target.words)
                data[at : at + (len(word) if chance.random() < 0.5 else 0)] = word
            case 6:
                other = chance.choice(corpus)
                cut = chance.randrange(len(other) + 1)
                data[at:] = other[cut:]
            case _:
                del data[at:]
                data += chance.randbytes(chance.randrange(3))
    return bytes(data[:LONGEST_INPUT])
