"""Passes of the real llama.cpp: what is found in the cache, copied or cut back, changes nothing."""

import asyncio
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from services.proxy_inference.batching import Plan, Schedule, Sequence
from services.proxy_inference.generation import Generation, Weights
from services.proxy_inference.running import Answer, Choice, Piece
from services.proxy_inference.sampling import Sampler, Sampling
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import BATCH_TOKENS, Heard, Room, parted
from services.proxy_inference.worker import Ticket, Worker
from shared.errors import EngineError
from tests.support import tiny_gguf

ROOM = Room(cells=1024, lanes=4, threads=1)


@pytest.fixture(params=tiny_gguf.ARCHITECTURES)
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Weights, None, None]:
    path = tiny_gguf.write(tmp_path / "m.gguf", request.param, quantized=False)
    weights = Weights(ModelFile(path, "a" * 64))
    yield weights
    weights.close()


def a_schedule() -> Schedule:
    return Schedule(lanes=4, cells=1024, batch_tokens=BATCH_TOKENS, most_reads=512)


def logits_of(
    generation: Generation, schedule: Schedule, sequences: list[Sequence]
) -> list[NDArray[np.float32]]:
    """The logits after each sequence, all of them scheduled at once."""
    found: dict[int, NDArray[np.float32]] = {}
    for sequence in sequences:
        schedule.add(sequence)
    while len(found) < len(sequences):
        plan = schedule.next()
        logits, row = generation.decode(plan), 0
        schedule.done(plan)
        for share in plan.shares:
            row += share.reads
            if share.reads:
                found[id(share.sequence)] = logits[row - 1].copy()
                schedule.end(share.sequence)
    return [found[id(sequence)] for sequence in sequences]


def test_a_reused_a_copied_and_a_cut_back_prefix_give_the_logits_of_a_fresh_cache(
    weights: Weights,
) -> None:
    random = np.random.default_rng(3)
    system = random.integers(5, 200, 150).tolist()  # beyond gemma's window of 128
    tails = [random.integers(5, 200, 40).tolist() for _ in range(4)]
    generation = Generation(weights, None, ROOM)

    def fresh(prompt: list[int]) -> NDArray[np.float32]:
        generation.clear()
        return logits_of(generation, a_schedule(), [Sequence(prompt)])[0]

    prompts = [system + tail for tail in tails] + [system[:100] + tails[0]]
    wanted = [fresh(prompt) for prompt in prompts]
    generation.clear()
    schedule = a_schedule()
    logits_of(generation, schedule, [Sequence(prompts[0])])
    again = [Sequence(prompt) for prompt in prompts[1:4]]
    for got, right in zip(logits_of(generation, schedule, again), wanted[1:4], strict=True):
        assert got == pytest.approx(right, abs=0.02)
    assert min(sequence.reused for sequence in again) >= 150
    back = Sequence(prompts[4])
    (got,) = logits_of(generation, schedule, [back])
    assert back.reused >= 100
    assert got == pytest.approx(wanted[4], abs=0.02)
    assert np.abs(wanted[4] - wanted[0]).max() > 0.1
    generation.close()


def test_a_pass_that_would_end_the_process_is_stopped_before(tmp_path: Path) -> None:
    weights = Weights(ModelFile(tiny_gguf.write(tmp_path / "m.gguf"), "a" * 64))
    generation = Generation(weights, None, ROOM)
    schedule = Schedule(lanes=4, cells=1024, batch_tokens=2000, most_reads=8)
    schedule.add(Sequence([5] * 600))
    with pytest.raises(AssertionError, match="a pass of 600 tokens"):
        generation.decode(schedule.next())
    generation.close()
    weights.close()


class Broken:
    """A generation whose second pass fails."""

    room = ROOM
    most_reads = 8
    idle_cells = 512

    def __init__(self) -> None:
        self.passes = 0

    def speak(self, plan: Plan, schedule: Schedule, runs: object) -> list[Heard]:
        self.passes += 1
        if self.passes == 2:
            raise EngineError("no memory")
        if self.passes == 4:
            raise RuntimeError("a bug")
        reads = sum(share.reads for share in plan.shares)
        return parted(plan.shares, np.ones((reads, 8), np.float32))

    def settle(self, settled: object) -> None: ...

    def clear(self) -> None: ...


async def test_a_failed_pass_costs_its_answers_and_a_bug_ends_the_worker_visibly() -> None:
    worker, generation = Worker(), cast("Any", Broken())
    worker.attach(generation)

    async def ask() -> tuple[str | None, str]:
        ticket = Ticket(Choice(Sequence([1, 2]), [0]), 0, asyncio.Queue())
        worker.submit(generation, ticket)
        _, piece = await ticket.pieces.get()
        return piece.finish, piece.error

    assert await ask() == ("stop", "")
    assert await ask() == ("error", "no memory")
    assert await ask() == ("stop", "")
    assert worker.counts.failed_passes == 1
    asking = asyncio.create_task(ask())
    with pytest.raises(RuntimeError, match="a bug"):
        await worker.ended
    asking.cancel()


class Quick:
    """A generation whose passes take a millisecond, and which never ends."""

    room = ROOM
    most_reads = 8
    idle_cells = 512

    def speak(self, plan: Plan, schedule: Schedule, runs: object) -> list[Heard]:
        time.sleep(0.001)
        reads = sum(share.reads for share in plan.shares)
        return parted(plan.shares, np.eye(1, 8, 1, dtype=np.float32).repeat(reads, axis=0))

    def settle(self, settled: object) -> None: ...

    def clear(self) -> None: ...


class Letters:
    def bytes_of(self, token: int) -> bytes:
        return b"abcdefgh"[token : token + 1]


async def test_a_text_comes_while_it_is_written_in_order_and_ends_at_once() -> None:
    worker, generation = Worker(), cast("Any", Quick())
    worker.attach(generation)
    queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    answers = [
        Answer(
            Sequence([1, 2]),
            Letters(),
            Sampler(Sampling(temperature=0.0), 0),
            max_tokens=length,
            stops=[],
            ends=frozenset({0}),
        )
        for length in (40, 400)
    ]
    for index, answer in enumerate(answers):
        worker.submit(generation, Ticket(answer, index, queue))
    texts, ends, seen = ["", ""], list[int](), list[int]()
    while len(ends) < 2:
        index, piece = await queue.get()
        texts[index] += piece.text
        seen.append(answers[1].written - len(texts[1]))
        if piece.finish:
            ends.append(index)
            assert len(texts[index]) == answers[index].written
    assert texts == ["b" * 40, "b" * 400]
    assert ends == [0, 1]
    assert sorted(seen)[len(seen) // 2] < 60, "what is written is not held back for long"
    worker.stop()
    await worker.ended
