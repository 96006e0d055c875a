"""A federated job in one process and in virtual time: what its bench counts is what was done."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from shared.engine.protocol import (
    AnswerUnion,
    Evaluated,
    Probe,
    Probed,
    RequestUnion,
    Walked,
)
from shared.errors import EngineError
from shared.messages import Task
from tests.bench.learn import running
from tests.bench.learn.curve import Point
from tests.bench.learn.engines import InProcess
from tests.bench.learn.fleet import Fleet
from tests.bench.learn.orders import Order
from tests.bench.learn.pacing import Pace
from tests.bench.learn.tasks import LearnTask
from tests.support import tiny_gguf

PACING = {"enough_devices": 3, "over_selection": 1.0, "lateness_rounds": 0, "deadline_s": 600.0}
TUNING = {
    "mezo": {"rounds": 4, "directions": 2, "batch_rows": 3, "step": 0.01},
    "fwdllm": {"rounds": 3, "directions": 6, "batch_rows": 3, "step": 0.01, "threshold": 1e9},
    "fedkseed": {"rounds": 3, "local_steps": 5, "batch_rows": 2, "eps": 1e-2, "step": 1e-3},
    "seedwire": {"rounds": 5, "directions": 32},
}


class TinyTask(LearnTask):
    """Four devices with a few rows each, on a random model."""

    path: Path

    def model(self, quantisation: str = "q8_0") -> Path:
        return self.path


@pytest.fixture
def task(tmp_path: Path) -> LearnTask:
    rows = [{"text": f"the {n} in a", "label": "ab"[n % 2]} for n in range(40)]
    made = TinyTask(
        name="tiny-iid-1",
        task=Task("choices", "{text} is", {"a": " a", "b": " b"}),
        devices={f"device-{n}": rows[8 * n : 8 * n + 8] for n in range(4)},
        heldout=rows[32:],
    )
    object.__setattr__(made, "path", tiny_gguf.write(tmp_path / "tiny.gguf"))
    return made


def a_fleet(task: LearnTask, row: str, budget_tokens: int = 10**9) -> Fleet:
    order = Order(
        row=row,
        dataset="tiny",
        seed=1,
        job={
            "tuning": {**TUNING[row], "method": row},
            "pacing": PACING,
            "evaluation": {"every_rounds": 0},
        },
        budget_tokens=budget_tokens,
    )
    submitted = running.submission(order, task)
    return Fleet(task, submitted, task.model(), Pace(budget_tokens, commits_between=1), seed=1)


@pytest.mark.parametrize("row", TUNING)
def test_the_account_is_what_the_devices_engines_have_sent_forward(
    task: LearnTask, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: Counter[str] = Counter()
    ask = InProcess.ask

    async def counted(self: InProcess, request: RequestUnion, *, timeout_s: float) -> AnswerUnion:
        answer = await ask(self, request, timeout_s=timeout_s)
        if isinstance(answer, Probed | Walked | Evaluated):
            sent[type(answer).__name__] += answer.passes
        return answer

    monkeypatch.setattr(InProcess, "ask", counted)
    fleet = a_fleet(task, row)
    fleet.run()
    assert fleet.ended == "finished"
    assert fleet.points[-1].commits == TUNING[row]["rounds"]
    assert fleet.points[-1].forward_tokens == sent.total() > 0
    assert not sent["Evaluated"]  # the judge is no device
    assert fleet.facts["closed: enough"] == fleet.facts["rounds"]
    assert fleet.facts["work_declined"] == fleet.facts["digest_mismatches"] == 0


def test_the_same_order_comes_to_the_same_numbers(task: LearnTask) -> None:
    def run() -> list[Point]:
        fleet = a_fleet(task, "mezo")
        fleet.run()
        return [replace(point, wall_s=0.0) for point in fleet.points]

    assert run() == run()


def test_a_run_ends_with_its_budget_and_with_a_last_point(task: LearnTask) -> None:
    whole, half = a_fleet(task, "mezo"), a_fleet(task, "mezo", budget_tokens=400)
    whole.run()
    half.run()
    assert half.ended == "budget"
    assert 400 <= half.points[-1].forward_tokens < whole.points[-1].forward_tokens
    same = whole.points[half.points[-1].commits]
    assert half.points[-1].loss == same.loss


def test_a_job_that_no_engine_can_measure_any_more_is_over(
    task: LearnTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = InProcess.ask

    async def refused(self: InProcess, request: RequestUnion, *, timeout_s: float) -> AnswerUnion:
        if isinstance(request, Probe) and request.round > 2:
            raise EngineError("the loss at theta is not finite")
        return await ask(self, request, timeout_s=timeout_s)

    monkeypatch.setattr(InProcess, "ask", refused)
    fleet = a_fleet(task, "mezo")
    fleet.run()
    assert fleet.ended == "diverged"
    assert [point.commits for point in fleet.points] == [0, 1, 2]
    assert fleet.facts["closed: abandoned"] == 3
    assert fleet.facts["work_declined"]
