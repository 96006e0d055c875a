"""The small model as the fleet tunes it, and the large one tuned directly, each on the same rows.

The small one is a job of the real services and edge clients (learn/fleet.py), in virtual time; its
last adapter is what the proxy would serve. The large one is LoRA by backpropagation and FedAvg
(learn/torch_rows.py): what a fleet would reach that could hold it, and train it.
"""

from pathlib import Path

from shared.adapter import Adapter
from shared.messages import LogEvent, RoundClosed, SubmitJob
from tests.bench.learn.curve import Curve
from tests.bench.learn.fleet import Fleet
from tests.bench.learn.orders import kept
from tests.bench.learn.pacing import Pace
from tests.bench.learn.running import submission
from tests.bench.learn.tasks import LearnTask
from tests.bench.proxy.plan import SEED, Plan, Rows

COMMITS_BETWEEN = 20
"""The judge looks only so often: the last adapter is what counts."""


class _Followed(Fleet):
    """Keeps the adapter that the log leads to."""

    def __init__(
        self, task: LearnTask, submitted: SubmitJob, model: Path, pace: Pace, seed: int
    ) -> None:
        super().__init__(task, submitted, model, pace, seed)
        self.adapter = Adapter.fresh(submitted.manifest)

    def _fact(self, event: LogEvent) -> None:
        if isinstance(event, RoundClosed):
            self.adapter = self._closes.after(self.adapter, event.round, event.commit)
            assert self.adapter.digest() == event.digest
        super()._fact(event)


def tuned(plan: Plan, found: Rows) -> tuple[bytes, bytes, Curve]:
    """The job's manifest, the snapshot it ended with, and its curve over the held-out rows."""
    task = found.small
    submitted = submission(plan.job, task)
    pace = Pace(plan.job.budget_tokens, COMMITS_BETWEEN, measure=plan.job.measure)
    fleet = _Followed(task, submitted, task.model(), pace, SEED)
    fleet.run()
    curve = Curve(
        row="seedwire",
        dataset=plan.dataset,
        seed=SEED,
        points=tuple(fleet.points),
        ended=fleet.ended,
        facts={name: float(count) for name, count in fleet.facts.items()},
    )
    return submitted.manifest, fleet.adapter.to_bytes(), curve


def ceiling(plan: Plan, found: Rows) -> Curve:
    """The large model's curve over the held-out rows, from alone to directly tuned, in float.

    Of ag_news, whose rows are exactly those of `NAME=learn`, its kept run is taken if there is one.
    """
    if plan.dataset == "ag_news" and (made := kept(plan.ceiling)) is not None:
        return made
    import msgspec

    from tests.bench.learn import torch_rows  # torch only where it is needed

    settings = msgspec.convert(plan.ceiling.torch, torch_rows.CeilingSettings)
    return torch_rows.ceiling(found.task, settings, SEED)
