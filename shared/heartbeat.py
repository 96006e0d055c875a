"""A file by which a process without a port shows that it lives: written often, read by a probe.

`python -m shared.heartbeat` is that probe: exit 0 if SEEDWIRE_EDGE_HEALTH_FILE says that the daemon
lives and is connected; with `--alive`, that it lives. It runs every few seconds on small devices,
so it imports next to nothing.

Ages are told by the machine's monotonic clock, which both sides share: a device's clock may jump.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec


class Heartbeat(msgspec.Struct, frozen=True):
    """What a process said of itself, and when."""

    connected: bool
    status: str
    at: float
    """The monotonic clock, seconds."""
    within_s: float
    """The next one comes before this has passed, if all is well."""

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.at


def write(path: Path, *, connected: bool, status: str, within_s: float) -> None:
    """`path` holds this heartbeat, whole at any moment.

    Raises:
        OSError: it cannot be written.
    """
    beat = Heartbeat(connected, status, time.monotonic(), within_s)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(msgspec.json.encode(beat))
    beside.replace(path)


def read(path: Path) -> Heartbeat:
    """The last heartbeat.

    Raises:
        OSError: there is none that can be read.
        ValueError: the file is something else.
    """
    return msgspec.json.decode(path.read_bytes(), type=Heartbeat)


VARIABLE = "SEEDWIRE_EDGE_HEALTH_FILE"


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code of the probe; why is on standard output, where container engines keep it."""
    if path := environ.get(VARIABLE):
        well, said = _probed(Path(path), only_alive="--alive" in arguments)
    else:
        well, said = False, f"{VARIABLE} names no file: the daemon writes no heartbeat"
    sys.stdout.write(f"edge: {said}\n")
    return 0 if well else 1


def _probed(path: Path, *, only_alive: bool) -> tuple[bool, str]:
    """Whether all is well, and what there is to say."""
    try:
        beat = read(path)
    except (OSError, ValueError) as error:
        return False, f"no heartbeat in {path}: {error}"
    if beat.age_s > beat.within_s:
        return False, f"its last heartbeat is {beat.age_s:.0f} s old: it hangs, or has ended"
    return beat.connected or only_alive, beat.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
