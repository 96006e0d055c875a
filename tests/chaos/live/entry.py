"""`python -m tests.chaos.live.entry PROGRAM ...`: the program itself, but for its ports.

CHAOS_KILL_AT      the write boundary at which it ends by SIGKILL; 0: none
CHAOS_KILL_TOLD    a file that is told which boundary that was
CHAOS_KEPT         a directory in which every spooled update stays
CHAOS_NAMESPACE    the network namespace that it runs in
CHAOS_MUTATION     a promise that it breaks: a function of tests.chaos.mutations
"""

import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from shared import nats_bus
from shared.orphans import PR_SET_PDEATHSIG
from shared.service import main
from tests.chaos.live.boundaries import KilledBus, KilledDisk
from tests.chaos.live.namespaces import enter

KEPT, MUTATION, NAMESPACE = "CHAOS_KEPT", "CHAOS_MUTATION", "CHAOS_NAMESPACE"
SERVICES = ("aggregator", "scheduler")


def run(program: str) -> int:
    """The program's exit code, if it comes to one."""
    setattr(nats_bus, "NatsBus", KilledBus)  # noqa: B010 - `connect` makes what stands here
    if mutation := os.environ.get(MUTATION):
        _mutate(mutation)
    if program in SERVICES:
        module = importlib.import_module(f"services.{program}.__main__")
        settings = importlib.import_module(f"services.{program}.config").Settings
        return main(settings, program, module.serve)
    daemon: Any = importlib.import_module("edge_client.__main__")
    spool = daemon.Spool

    def spooling(directory: Path, **more: Any) -> Any:
        disk = KilledDisk(directory, Path(os.environ[KEPT]), KilledBus.switch)
        return spool(directory, disk=disk, **more)

    daemon.Spool = spooling
    return daemon.main()


def _mutate(name: str) -> None:
    import pytest  # only a mutated process needs it

    from tests.chaos import mutations

    getattr(mutations, name)(pytest.MonkeyPatch())


def _ends_with_its_parent() -> None:
    """A schedule that is killed leaves no process behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _ends_with_its_parent()
    if namespace := os.environ.get(NAMESPACE):
        enter(namespace)
    sys.argv = sys.argv[1:]
    sys.exit(run(sys.argv[0]))
