"""What the live page is sent: everything of one job and of the fleet, or what changed of it.

Pure. Rows are merged by the page under their first field; `gone` takes one away. Fields that hold
their default are left out. Bounded however large the fleet is: the page shows the newest, and
`/jobs` and `/devices` have all.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from services.telemetry.devices import DeviceRow, Standing
from services.telemetry.history import EvaluationRow, JobHistory, PublishedRow, RoundRow
from services.telemetry.journal import Key
from services.telemetry.state import ArmRow, Refusal, State, counter
from shared.metrics import COUNTERS

SHOWN_JOBS = 200
SHOWN_ROUNDS = 2_000
SHOWN_DEVICES = 5_000
SHOWN_ARMS = 1_000
SHOWN_PUBLISHED = 50
REGISTRAR = "registrar"
"""The service that knows who was let in."""


class ShownRound(msgspec.Struct, omit_defaults=True):
    round: int
    kind: str = "tune"
    reason: str = ""
    wanted: int = 0
    devices: int = 0
    wanted_probes: int = 0
    probes: int = 0
    updates: int = 0
    late: int = 0
    loss: float | None = None
    signal: float | None = None
    variance: float | None = None


class ShownEvaluation(msgspec.Struct, omit_defaults=True):
    round: int
    accuracy: float = 0.0
    loss: float = 0.0
    examples: int = 0


class ShownDevice(msgspec.Struct, omit_defaults=True):
    """`heard` is by the clock of `Shown.now`; null: not since telemetry started."""

    device: str
    standing: Standing = "waiting"
    why: str = ""
    unable: dict[str, str] = {}
    job: str = ""
    working: str = ""
    """What it works at: kind, round."""
    heard: float | None = None
    rows: int = 0
    heldout_rows: int = 0
    trusted: bool = False
    rounds: int = 0
    probes: int = 0
    work_s: float = 0.0
    late: int = 0
    refused: int = 0
    reconnects: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    version: str = ""
    cores: int = 0
    memory_mb: int = 0


class ShownArm(msgspec.Struct, omit_defaults=True):
    device: str
    round: int = 0
    plays: int = 0
    mean: float = 0.0
    index: float | None = None
    reason: str = ""


class ShownService(msgspec.Struct, omit_defaults=True):
    """`uptime_s` is what it said at `heard`, by the clock of `Shown.now`."""

    service: str
    heard: float
    version: str = ""
    uptime_s: float = 0.0
    problem: str = ""
    counters: dict[str, int] = {}


class Gone(msgspec.Struct):
    """The row of this name is no more."""

    name: str | int
    gone: bool = True


class Fleet(msgspec.Struct):
    """Totals; small enough to be sent whole."""

    not_ready: str
    devices: int
    devices_seen: int
    standings: dict[Standing, int]
    decisions: dict[str, int]
    settled: dict[str, int]
    links: dict[str, int]
    connections_refused: int
    devices_revoked: int
    registrar: bool
    """Whether anybody says who was refused."""


class Shown(msgspec.Struct, omit_defaults=True):
    """One message to the page."""

    version: int
    now: float
    chosen: str = ""
    counters: dict[str, str] = {}
    """A sentence for each counter; in the first message alone."""
    fleet: Fleet | None = None
    jobs: list[dict[str, object]] = []
    rounds: list[ShownRound | Gone] = []
    evaluations: list[ShownEvaluation | Gone] = []
    published: list[PublishedRow | Gone] = []
    devices: list[ShownDevice | Gone] = []
    arms: list[ShownArm | Gone] = []
    services: list[ShownService | Gone] = []
    refused_updates: list[Refusal] | None = None
    refused_connections: list[Refusal] | None = None


def everything(state: State, chosen: str, now: float, not_ready: str) -> Shown:
    """All that is shown, with job `chosen` in full."""
    job = state.jobs.get(chosen) or JobHistory(chosen)
    others = [name for name in state.jobs if name != chosen][-SHOWN_JOBS + 1 :]
    names = [name for name in state.jobs if name in {*others, chosen}]
    arms = [row for (of, _), row in state.arms.items() if of == chosen]
    return Shown(
        version=state.journal.version,
        now=now,
        chosen=chosen,
        counters=COUNTERS,
        fleet=fleet(state, not_ready),
        jobs=[state.jobs[name].summary() for name in names],
        rounds=[_round(row) for row in _newest(job.rounds.values(), SHOWN_ROUNDS)],
        evaluations=[_evaluation(one) for one in _newest(job.evaluations.values(), SHOWN_ROUNDS)],
        published=[*_newest(job.published.values(), SHOWN_PUBLISHED)],
        devices=[_device(row) for row in _newest(state.devices.values(), SHOWN_DEVICES)],
        arms=[_arm(row) for row in _newest(arms, SHOWN_ARMS)],
        services=[_service(state, name) for name in state.services],
        refused_updates=list(state.refused_updates),
        refused_connections=list(state.refused_connections),
    )


def changed(state: State, chosen: str, since: int, now: float) -> Shown | None:
    """What is another since version `since`; None: too much, send everything."""
    keys = state.journal.since(since)
    if keys is None or len(keys) > SHOWN_DEVICES:
        return None
    shown = Shown(version=state.journal.version, now=now)
    for key in keys:
        _add(shown, state, chosen, key)
    return shown


def fleet(state: State, not_ready: str) -> Fleet:
    """The totals as of now."""
    refused = counter(state.services, REGISTRAR, "connections_refused")
    return Fleet(
        not_ready=not_ready,
        devices=len(state.devices),
        devices_seen=state.devices_seen,
        standings=dict(state.standings),
        decisions=dict(state.decisions),
        settled=dict(state.settled),
        links=dict(state.links),
        connections_refused=max(refused, state.connections_refused),
        devices_revoked=counter(state.services, REGISTRAR, "devices_revoked"),
        registrar=REGISTRAR in state.services or state.connections_refused > 0,
    )


def _add(shown: Shown, state: State, chosen: str, key: Key) -> None:
    """Put one changed row into the message; a row of another job is left out."""
    kind, of, name = key
    job = state.jobs.get(of)
    match kind:
        case "job":
            shown.jobs.append(job.summary() if job else {"job": of, "gone": True})
        case "device":
            row = state.devices.get(str(name))
            shown.devices.append(_device(row) if row else Gone(name))
        case "service":
            shown.services.append(_service(state, str(name)))
        case "refused":
            if name == "updates":
                shown.refused_updates = list(state.refused_updates)
            else:
                shown.refused_connections = list(state.refused_connections)
        case "arm" if of == chosen:
            arm = state.arms.get((of, str(name)))
            shown.arms.append(_arm(arm) if arm else Gone(name))
        case _ if of == chosen and job is not None and isinstance(name, int):
            _add_round(shown, job, kind, name)
        case _:
            pass


def _add_round(shown: Shown, job: JobHistory, kind: str, round: int) -> None:
    if kind == "round":
        row = job.rounds.get(round)
        shown.rounds.append(_round(row) if row else Gone(round))
    elif kind == "evaluation":
        one = job.evaluations.get(round)
        shown.evaluations.append(_evaluation(one) if one else Gone(round))
    else:
        shown.published.append(job.published.get(round) or Gone(round))


def _newest(rows: Iterable[Any], limit: int) -> list[Any]:
    return list(rows)[-limit:]


def _round(row: RoundRow) -> ShownRound:
    return ShownRound(
        row.round,
        row.kind,
        row.reason,
        row.wanted,
        row.devices,
        row.wanted_probes,
        row.probes,
        row.updates,
        row.late,
        row.loss,
        row.signal,
        row.variance,
    )


def _evaluation(row: EvaluationRow) -> ShownEvaluation:
    return ShownEvaluation(row.round, row.accuracy, row.loss, row.examples)


def _device(row: DeviceRow) -> ShownDevice:
    report, hand = row.report, row.hand
    shown = ShownDevice(
        row.device,
        standing=row.standing,
        why=row.why(),
        unable=row.unable,
        job=row.job,
        working=f"{hand.kind}, round {hand.round}" if hand else "",
        heard=row.heard,
        rounds=row.rounds,
        probes=row.probes,
        work_s=round(row.work_s, 3),
        late=row.late,
        refused=row.settled.get("rejected", 0) + row.settled.get("too_late", 0),
    )
    if report is not None:
        shown.rows, shown.heldout_rows = report.rows, report.heldout_rows
        shown.trusted, shown.version = report.trusted, report.version
        shown.cores, shown.memory_mb = report.cores, report.memory_mb
        shown.reconnects = report.counters.get("reconnects", 0)
        shown.bytes_in = report.counters.get("link_bytes_in", 0)
        shown.bytes_out = report.counters.get("link_bytes_out", 0)
    return shown


def _arm(row: ArmRow) -> ShownArm:
    return ShownArm(row.device, row.round, row.plays, row.mean, row.index, row.reason)


def _service(state: State, name: str) -> ShownService:
    report = state.services[name]
    return ShownService(
        name,
        state.services_heard[name],
        report.version,
        report.uptime_s,
        report.problem,
        report.counters,
    )
