"""The async face of the engine's child process.

Knows neither numpy nor llama_cpp: the daemon stays small, and a native abort, an out-of-memory kill
or a hang costs it one request. Jobs live in the child: whoever opened them must open them again
when `generation` has increased.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Literal, cast

import msgpack
import msgspec

from shared.engine.protocol import AnswerUnion, Failed, RequestUnion
from shared.errors import EngineDied, EngineError
from shared.logs import get

_CHUNK_BYTES = 1 << 16
_GOODBYE_S = 5.0
_LAST_WORDS = 3
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""numpy's threads spin against the model's; its matrices here are too small for them anyway."""
_LAST_WORD = {"GGML_NO_BACKTRACE": "1"}
"""llama.cpp's reason to end the process is the last that it says, and no debugger is started."""

_ROOT = Path(__file__).resolve().parents[2]

log = get("engine")


class _Child:
    """One running child, and the frames that come out of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.pid = process.pid
        self._in = process.stdin
        self._out = process.stdout
        self._unpacker = msgpack.Unpacker()
        self.last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        # Not in a TaskGroup: it lives exactly as long as the child, and `close` waits for it.
        self.listener = asyncio.create_task(self._listen(process.stderr))

    async def exchange(self, request: RequestUnion) -> AnswerUnion | None:
        """The answer to `request`; None where the child ended before it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._in.write(msgspec.msgpack.encode(request))
            await self._in.drain()
        while data := await self._out.read(_CHUNK_BYTES):
            self._unpacker.feed(data)
            for answer in self._unpacker:
                try:
                    return msgspec.convert(answer, AnswerUnion)
                except msgspec.ValidationError as error:
                    return Failed(f"the engine's numbers do not fit a message: {error}")
        return None

    def hang_up(self) -> None:
        """Let the child see the end of its requests."""
        self._in.close()

    def kill(self) -> None:
        # Not `process.kill()`: it polls first, and so may reap what asyncio's watcher waits for.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._in.close()

    async def epitaph(self) -> str:
        """Why the child ended, once it has."""
        code = await self.process.wait()
        await self.listener
        how = f"exited with code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory?)"
        said = " | ".join(self.last_words)
        return f"{how}; its last words: {said}" if said else how

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        rest, data = b"", b"\n"
        while data:
            data = await stderr.read(_CHUNK_BYTES)
            *lines, rest = (rest + (data or b"\n")).split(b"\n")
            rest = rest[-_CHUNK_BYTES:]
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text:
                    self.last_words.append(text[:400])
                    log.debug("engine_said", pid=self.pid, text=text[:2000])


class EngineProcess:
    """Implements `protocol.Worker` over a child that is started when first needed."""

    def __init__(self, kind: Literal["llama", "fake"]) -> None:
        self._kind = kind
        self._child: _Child | None = None
        self._buried: set[asyncio.Task[str]] = set()
        self._turn = asyncio.Lock()
        self._peak_rss_mb = 0.0
        self.generation = 0
        """Increases with every start of a child; whatever an earlier one held is gone."""

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return None if self._child is None else self._child.pid

    @property
    def peak_rss_mb(self) -> float:
        return self._peak_rss_mb

    async def ask(self, request: RequestUnion, *, timeout_s: float) -> AnswerUnion:
        """The child's answer; one request at a time.

        Cancelling it ends the child, whose answer nobody would read.

        Raises:
            EngineError: the child refused, or met a bug: then the text is its traceback.
            EngineDied: the child ended, or did not answer in time and was ended.
        """
        name = type(request).__name__
        async with self._turn:
            child = await self._running()
            answer = burial = None
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await child.exchange(request)
            except TimeoutError as error:
                raise EngineDied(
                    f"the engine did not answer {name} within {timeout_s:g} s and was ended"
                ) from error
            finally:
                self._sample_memory(child)
                if answer is None:
                    self._child = None
                    burial = self._bury(child)
        if burial is not None:
            raise EngineDied(f"the engine {await burial} during {name}")
        assert answer is not None
        if isinstance(answer, Failed):
            raise EngineError(answer.reason)
        return answer

    async def close(self) -> None:
        """End the child: gently, then not."""
        async with self._turn:
            child, self._child = self._child, None
            if child is not None:
                child.hang_up()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_GOODBYE_S):
                        await child.process.wait()
                await self._bury(child)
            await asyncio.gather(*self._buried)

    def _bury(self, child: _Child) -> asyncio.Task[str]:
        """Make sure that the child ends; its epitaph comes when it has."""
        if child.process.returncode is None:
            child.kill()
        burial = asyncio.create_task(child.epitaph())
        self._buried.add(burial)
        burial.add_done_callback(self._buried.discard)
        return burial

    async def _running(self) -> _Child:
        if self._child is None:
            self.generation += 1
            python_path = os.pathsep.join(
                path for path in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if path
            )
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-m", "shared.engine.worker"),
                *("--engine", self._kind, "--parent", str(os.getpid())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **_ONE_THREAD, **_LAST_WORD, "PYTHONPATH": python_path},
                start_new_session=True,  # Ctrl-C is the daemon's to handle
            )
            self._child = _Child(process)
            log.debug("engine_started", pid=process.pid, generation=self.generation)
        return self._child

    def _sample_memory(self, child: _Child) -> None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
            kilobytes = next(
                float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")
            )
            self._peak_rss_mb = max(self._peak_rss_mb, kilobytes / 1024)
        except (OSError, StopIteration):
            if sys.platform == "darwin":  # no /proc; only children that have ended are counted
                bytes_ = cast("int", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
                self._peak_rss_mb = max(self._peak_rss_mb, bytes_ / 2**20)
