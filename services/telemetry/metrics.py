"""The state as Prometheus metrics: one family for each counter there is, and gauges for jobs."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from services.telemetry.history import JobHistory
from services.telemetry.state import State
from shared.metrics import COUNTERS

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OTHERS = "_others"
"""Stands, as `device`, for all devices that have no series of their own."""

SERVICE = "telemetry"


def _of_distillation(name: str) -> Callable[[JobHistory], float | None]:
    """A figure of how the job's epoch was made; None where it was not distilled."""
    return lambda job: None if job.distilled is None else getattr(job.distilled, name)


_GAUGES: dict[str, tuple[str, Callable[[JobHistory], float | None]]] = {
    "seedwire_job_running": (
        "1 while the job runs, 0 when it waits for its next epoch or has ended.",
        lambda job: float(job.status == "running"),
    ),
    "seedwire_job_waiting": (
        "1 while the job waits for its next epoch.",
        lambda job: float(job.status == "waiting"),
    ),
    "seedwire_job_epoch": ("The job's epoch, counted from 0.", lambda job: job.epoch),
    "seedwire_job_epochs_planned": ("The job's epochs.", lambda job: job.epochs),
    **{
        f"seedwire_job_distilled_{name}": (sentence, _of_distillation(name))
        for name, sentence in {
            "teacher_entropy_before": "Entropy of the ensemble that was distilled, nats.",
            "teacher_entropy_after": "Entropy of the ensemble that the epoch began with, nats.",
            "held_out_loss_before": "Loss on held-out public rows before distillation, nats.",
            "held_out_loss_after": "Loss on held-out public rows after distillation, nats.",
            "ensemble_loss_before": "The ensemble's loss on them before distillation, nats.",
            "ensemble_loss_after": "The ensemble's loss on them after distillation, nats.",
            "kl_before": "Divergence of the small model from its teacher before, nats.",
            "kl_after": "Divergence of the small model from its teacher after, nats.",
        }.items()
    },
    "seedwire_job_round": ("The last round opened.", lambda job: job.round),
    "seedwire_job_rounds_planned": ("The job's rounds.", lambda job: job.rounds_planned),
    "seedwire_job_loss": (
        "Mean loss of the devices' own batches at the last close, nats.",
        lambda job: job.loss,
    ),
    "seedwire_job_heldout_loss": (
        "Mean loss on held-out rows at the last evaluation, nats.",
        lambda job: job.evaluation.loss if job.evaluation else None,
    ),
    "seedwire_job_accuracy": (
        "Share of held-out rows answered right at the last evaluation.",
        lambda job: job.accuracy,
    ),
}


class StateCollector(Collector):
    """Reads the state whenever Prometheus asks."""

    def __init__(self, state: State, own: Mapping[str, int]) -> None:
        self._state = state
        self._own = own

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield from self._jobs()
        yield from self._fleet()

    def _counters(self) -> Iterator[Metric]:
        state = self._state
        sources: list[tuple[list[str], Mapping[str, int]]] = [
            ([name, ""], report.counters)
            for name, report in state.services.items()
            if name != SERVICE
        ]
        sources.append(([SERVICE, ""], self._own))
        sources += [
            (["", row.device], row.report.counters)
            for row in state.devices.values()
            if row.own_series and row.report
        ]
        if state.others:
            sources.append((["", OTHERS], state.others))
        for name, sentence in COUNTERS.items():
            family = CounterMetricFamily(f"seedwire_{name}", sentence, labels=["service", "device"])
            for labels, counts in sources:
                if name in counts:
                    family.add_metric(labels, counts[name])
            yield family

    def _jobs(self) -> Iterator[Metric]:
        for name, (sentence, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, sentence, labels=["job"])
            for job in self._state.jobs.values():
                value = read(job)
                if value is not None:
                    gauge.add_metric([job.job], value)
            yield gauge
        closed = CounterMetricFamily(
            "seedwire_job_rounds_closed", "Rounds closed, by reason.", labels=["job", "reason"]
        )
        for job in self._state.jobs.values():
            for reason, count in job.closed.items():
                closed.add_metric([job.job, reason], count)
        yield closed

    def _fleet(self) -> Iterator[Metric]:
        state = self._state
        yield GaugeMetricFamily(
            "seedwire_devices", "Devices known to telemetry.", value=len(state.devices)
        )
        seen = CounterMetricFamily("seedwire_devices_seen", "Devices heard of for the first time.")
        seen.add_metric([], state.devices_seen)
        yield seen
        uptime = GaugeMetricFamily(
            "seedwire_service_uptime_seconds",
            "How long each service had been up when it last said so.",
            labels=["service", "version"],
        )
        for name, report in state.services.items():
            uptime.add_metric([name, report.version], report.uptime_s)
        yield uptime
        decisions = CounterMetricFamily(
            "seedwire_decisions", "Work assigned by the scheduler, by kind.", labels=["kind"]
        )
        for kind, count in state.decisions.items():
            decisions.add_metric([kind], count)
        yield decisions
        settled = CounterMetricFamily(
            "seedwire_updates_settled", "Updates settled, by outcome.", labels=["outcome"]
        )
        for outcome, count in state.settled.items():
            settled.add_metric([outcome], count)
        yield settled


def exposition(state: State, own: Mapping[str, int]) -> bytes:
    """The metrics in the text format of Prometheus."""
    registry = CollectorRegistry()
    registry.register(StateCollector(state, own))
    return generate_latest(registry)
