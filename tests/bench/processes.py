"""One piece of a long benchmark in a process of its own: it ends with its parent."""

import asyncio
import os
import sys
import time

from deploy.demo.processes import ROOT
from shared.orphans import ends_with_parent

LAST_WORDS = 4000


class RunFailed(Exception):
    """A run came to nothing; the text is the end of what it said."""


async def run_module(name: str, module: str, *arguments: str, environment: dict[str, str]) -> None:
    """`python -m module`, with `environment` beside ours; `name` is what it is told as.

    Raises:
        RunFailed: it came to nothing.
    """
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **environment},
        preexec_fn=ends_with_parent(),
    )
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        words = said.decode(errors="replace")[-LAST_WORDS:]
        raise RunFailed(f"{name} exited with {process.returncode}:\n{words}")
    print(f"{name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
