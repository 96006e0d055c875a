"""Children that end when their parent does, however it ends."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def ends_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` after which the child gets SIGTERM when this process ends; Linux only.

    None elsewhere: there a parent that is killed leaves its children behind. Call it in the thread
    that starts the child and outlives it: the kernel takes that thread's end for the parent's.
    """
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def follow() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(1)

    return follow
