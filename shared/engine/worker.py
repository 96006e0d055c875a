"""The engine's child process: requests come in on stdin, answers leave on what was stdout.

Run as `python -m shared.engine.worker --engine llama|fake --parent <pid>`. It holds Theta, the
model and the data of each job; it knows no network. It ends with its parent: at the end of stdin,
and on Linux by a signal.
"""

import argparse
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgpack
import msgspec

from shared.engine.evaluating import evaluate
from shared.engine.job import Job
from shared.engine.model import Engine
from shared.engine.probing import probe
from shared.engine.protocol import (
    AnswerUnion,
    Apply,
    CloseJob,
    Done,
    Evaluate,
    Evaluated,
    Failed,
    Inspect,
    Look,
    OpenJob,
    Probe,
    Probed,
    RequestUnion,
    Restore,
    Standing,
    Walk,
    Walked,
)
from shared.engine.walking import walk
from shared.errors import EngineError, SeedwireError

Asked = TypeVar("Asked", Probe, Walk, Evaluate)
Found = TypeVar("Found")

_CHUNK_BYTES = 1 << 16
_SET_DEATH_SIGNAL = 1


class Child:
    """Jobs by name, and what is done with them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: dict[str, Job] = {}

    def answer(self, request: RequestUnion) -> AnswerUnion:
        """What `request` asks for, or Failed: the loop outlives every error that Python can see."""
        try:
            return self._do(request)
        except SeedwireError as error:
            return Failed(reason=str(error))
        except Exception:  # noqa: BLE001  one request must not cost the others their jobs
            return Failed(reason=traceback.format_exc(), bug=True)

    def _do(self, request: RequestUnion) -> AnswerUnion:
        match request:
            case Inspect():
                return self._engine.inspect(
                    request.path, request.words, request.template, request.prompt
                )
            case OpenJob():
                self._close(request.job)
                job = self._jobs[request.job] = Job(request, self._engine)
                return job.opened()
            case Look():
                return self._job(request.job).look()
            case Restore():
                return self._restore(request)
            case Apply():
                job = self._job(request.job)
                job.adapter.apply(request.round, request.commit)
                return job.standing()
            case Probe():
                return Probed(*self._measured(probe, request))
            case Walk():
                return Walked(*self._measured(walk, request))
            case Evaluate():
                return Evaluated(*self._measured(evaluate, request))
            case CloseJob():
                self._close(request.job)
                return Done()

    def _restore(self, request: Restore) -> Standing:
        job = self._job(request.job)
        try:
            snapshot = Path(request.path).read_bytes()
        except OSError as error:
            raise EngineError(f"{request.path}: cannot be read: {error.strerror}") from error
        job.restore(snapshot)
        return job.standing()

    def _measured(
        self, work: Callable[[Job, Asked], Found], request: Asked
    ) -> tuple[Found, float, int]:
        """What `work` finds, the seconds it took and the tokens it sent forward."""
        job = self._job(request.job)
        began, sent = time.perf_counter(), job.model.forwarded
        found = work(job, request)
        return found, time.perf_counter() - began, job.model.forwarded - sent

    def _job(self, name: str) -> Job:
        if name not in self._jobs:
            raise EngineError(f"job {name} is not open in this engine; open it first")
        return self._jobs[name]

    def _close(self, name: str) -> None:
        if name in self._jobs:
            self._jobs.pop(name).model.close()


def main() -> None:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser(description="the engine's child process")
    parser.add_argument("--engine", choices=["llama", "fake"], required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.dup(1)
    os.dup2(2, 1)  # what native code prints must not reach the pipe
    _die_with(arguments.parent)
    child = Child(_engine(arguments.engine))
    encoder = msgspec.msgpack.Encoder()
    for request in _requests():
        data = memoryview(encoder.encode(child.answer(request)))
        while data:
            data = data[os.write(answers, data) :]


def _requests() -> Iterator[RequestUnion]:
    unpacker = msgpack.Unpacker()
    while data := os.read(0, _CHUNK_BYTES):
        unpacker.feed(data)
        for request in unpacker:
            yield msgspec.convert(request, RequestUnion)


def _engine(name: str) -> Engine:
    """The engine called `name`; the other one is not even imported."""
    if name == "fake":
        from shared.engine.fake import FakeEngine

        return FakeEngine()
    from shared.engine.llama import LlamaEngine

    return LlamaEngine()


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    main()
