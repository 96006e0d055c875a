"""When no epoch opens: a job that does not wait, a student that has become worse, wrong files."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace as with_
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from services.aggregator.config import Settings
from services.aggregator.service import Aggregator
from services.distiller.__main__ import main
from services.distiller.waiting import open_epoch, waiting
from shared import subjects
from shared.clock import SystemClock
from shared.codec import encode
from shared.errors import EngineError, RejectError
from shared.memory_bus import MemoryBroker
from shared.messages import Distilled, StopJob
from shared.runtime import Stop
from tests.support.aggregators import open_round
from tests.support.jobs import a_job, a_probe
from tests.support.waiting import wait_until

FIGURES = Distilled(1.0, 10, 5, 100, 3, 0.5, 0.4, 0.3, 0.2)


@asynccontextmanager
async def serving(broker: MemoryBroker) -> AsyncGenerator[Aggregator, None]:
    bus = broker.connect("aggregator")
    aggregator = Aggregator(bus, bus, Settings(), SystemClock())
    stop, ready = Stop(), asyncio.Event()
    task = asyncio.create_task(aggregator.serve(stop, ready.set))
    await ready.wait()
    try:
        yield aggregator
    finally:
        stop.set()
        await task


async def test_only_a_job_that_waits_is_distilled_and_it_stands_beside_its_last_anchor() -> None:
    broker = MemoryBroker()
    link = broker.connect("distiller")

    async with serving(broker) as aggregator:

        async def a_round() -> None:
            opened = open_round(aggregator)
            for device, first in (("a", 0), ("b", 8)):
                update = a_probe(opened, device, first=first)
                await link.publish(subjects.update("demo", device), encode(update))
            await wait_until(lambda: aggregator.jobs["demo"].open is not opened)

        submit = a_job(rounds=1, momentum=100)
        await aggregator.answer(replace(submit, spec=replace(submit.spec, epochs=3)))
        with pytest.raises(RejectError, match="no job is called other"):
            await waiting(link, "other")
        with pytest.raises(RejectError, match="the rounds of epoch 1 of job demo are not done"):
            await waiting(link, "demo")
        await a_round()
        first = await waiting(link, "demo")
        assert first.adapter.digest() == aggregator.jobs["demo"].adapter.digest()
        assert not first.anchor.any()
        theta = first.adapter.theta
        assert await open_epoch(link, first, theta, theta // 2, FIGURES) == 1
        with pytest.raises(RejectError, match="is running in epoch 2 of 3"):
            await open_epoch(link, first, theta, theta // 2, FIGURES)
        await a_round()
        second = await waiting(link, "demo")
        assert second.adapter.manifest.epoch == 1
        half = ((theta // 2) * 2.0**-24).astype(np.float32)
        np.testing.assert_array_equal(second.anchor, half)
        assert await open_epoch(link, second, theta, theta // 3, FIGURES) == 2
        with pytest.raises(RejectError, match="is in the last of its 3 epochs"):
            await waiting(link, "demo")
        await aggregator.answer(StopJob(job="demo"))
        with pytest.raises(RejectError, match="job demo has ended; submit one with --epochs"):
            await waiting(link, "demo")


def test_a_student_that_became_worse_opens_nothing_and_neither_does_one_nobody_can_judge() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from services.distiller.distilling import Judged
    from services.distiller.working import Made, obstacle, theta

    judged = Judged(1.5, 2.0, 1.2, 0.4, 0.3, 0.5, 1.0, 0.2)
    nothing = np.zeros(2, np.int32)
    made = Made(nothing, nothing, judged, with_(judged, small_loss=1.4), FIGURES)
    assert obstacle(made) is None
    worse = with_(made, after=with_(judged, small_loss=1.6))
    assert "rose from 1.5000 to 1.6000, so the epoch was not opened; " in str(obstacle(worse))
    unknown = with_(judged, small_loss=math.nan)
    unjudged = obstacle(with_(made, before=unknown, after=unknown))
    assert "no held-out row has an answer" in str(unjudged)
    np.testing.assert_array_equal(theta(np.array([0.5, -(2.0**-24)], np.float32)), [2**23, -1])
    for astray in (200.0, math.nan):
        with pytest.raises(EngineError, match="too large to be one; lower --rate"):
            theta(np.array([astray], np.float32))


def test_a_file_that_is_not_there_is_named_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    given = ["--job", "demo", "--small", str(tmp_path), "--public", str(rows), "--json"]
    assert main(given) == 78
    assert json.loads(capsys.readouterr().err) == {"error": "--large is missing", "code": 78}
    assert main([*given, "--large", str(tmp_path / "no.gguf")]) == 78
    assert "no.gguf: there is no such file" in capsys.readouterr().err
    assert main([*given, "--large", str(rows), "--small", str(rows)]) == 78
    assert "there is no such folder" in capsys.readouterr().err
