"""`python -m tests.chaos.abuse [TARGET ...]`: fuzz what reads foreign bytes, for as long as told.

--seconds S   for each target
--seed S      what a finding prints
--atheris     one target by atheris (libFuzzer), where that is installed
"""

import argparse
import importlib
import json
import sys
from typing import Any

from tests.chaos.abuse.fuzzing import fuzz
from tests.chaos.abuse.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.abuse")
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    given = parser.parse_args()
    if given.atheris:
        return _atheris(given.targets[0], given.seconds, given.seed)
    found = 0
    for name in given.targets:
        result = fuzz(TARGETS[name], given.seed, 1 << 62, given.seconds)
        found += len(result.findings)
        record: dict[str, object] = {
            "name": f"abuse.{name}",
            "inputs": result.inputs,
            "lines": len(result.sites),
            "corpus": len(result.corpus),
            "slowest_s": round(result.slowest_s, 3),
            "findings": [[one.why[:200], one.data[:400].hex()] for one in result.findings],
        }
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
    return 1 if found else 0


def _atheris(name: str, seconds: float, seed: int) -> int:
    """libFuzzer ends the process itself, with a code that says whether it found something."""
    atheris: Any = importlib.import_module("atheris")
    atheris.instrument_all()
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-timeout=5"]
    options += ["-rss_limit_mb=1024", "-max_len=8192", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options], TARGETS[name].run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
