"""Every subject, stream and queue name; nothing else spells one."""

import re

PREFIX = "seedwire.v1"
NAME = re.compile(r"^[A-Za-z0-9_-]{1,64}$")
"""What a job or device may be called: one subject token."""

LOG_STREAM = "LOG"
DETAIL_STREAM = "DETAIL"
UPDATES_STREAM = "UPDATES"
BLOBS_STREAM = "BLOBS"
REPORTS_STREAM = "REPORTS"

WRITER = "=writer"
"""Stands in a stream's subject for the job, where its writer speaks of itself; names no job."""

KEY_HEADER = "Seedwire-Key"
"""Names an update's key outside its body, so that an undecodable one can be settled too."""

JOB_SUBMIT = f"{PREFIX}.job.submit"
JOB_STOP = f"{PREFIX}.job.stop"
JOB_EPOCH = f"{PREFIX}.job.epoch"
JOB_LIST = f"{PREFIX}.job.list"
DEVICE_LIST = f"{PREFIX}.device.list"
ENROLL = f"{PREFIX}.enroll"
"""The one subject that a connection without credentials may publish on."""
IDENTITY_INVITE = f"{PREFIX}.identity.invite"
IDENTITY_REVOKE = f"{PREFIX}.identity.revoke"
IDENTITY_LIST = f"{PREFIX}.identity.list"
IDENTITY_REFUSED = f"{PREFIX}.identity.refused"
"""Refusals that only who runs the broker sees: those before anybody could say a name."""
REFUSED = f"{PREFIX}.refused"
"""Connections that were not let in."""

ALL_LOGS = f"{PREFIX}.log.*"
ALL_DETAILS = f"{PREFIX}.detail.*"
ALL_UPDATES = f"{PREFIX}.update.*.*"
ALL_BLOBS = f"{PREFIX}.blob.*.*"
ALL_EVENTS = f"{PREFIX}.events.*"
ALL_DECISIONS = f"{PREFIX}.decision.*"
ALL_WORK = f"{PREFIX}.work.*"
ALL_REPORTS = f"{PREFIX}.report.*"
ALL_SETTLED = f"{PREFIX}.settled.*"
ALL_SERVICES = f"{PREFIX}.service.*"


def log(job: str) -> str:
    """The one subject of a job's public facts in stream LOG."""
    return f"{PREFIX}.log.{job}"


def events(job: str) -> str:
    """Where the broker republishes what stream LOG has accepted."""
    return f"{PREFIX}.events.{job}"


def detail(job: str) -> str:
    """A job's private facts (they name devices) in stream DETAIL."""
    return f"{PREFIX}.detail.{job}"


def update(job: str, device: str) -> str:
    """What a device measured, in stream UPDATES until the aggregator has settled it."""
    return f"{PREFIX}.update.{job}.{device}"


def settled(device: str) -> str:
    """What became of a device's updates."""
    return f"{PREFIX}.settled.{device}"


def work(device: str) -> str:
    """Where a device asks for work."""
    return f"{PREFIX}.work.{device}"


def wake(device: str) -> str:
    """Calls a device that has been told to come back later."""
    return f"{PREFIX}.wake.{device}"


def report(device: str) -> str:
    """What a device is, has and does."""
    return f"{PREFIX}.report.{device}"


def decision(job: str) -> str:
    """What the scheduler assigned for a job, and why; nobody keeps it."""
    return f"{PREFIX}.decision.{job}"


def service(name: str) -> str:
    """A service's counters."""
    return f"{PREFIX}.service.{name}"


def blob(digest: str, index: int) -> str:
    """One chunk of a file, in stream BLOBS."""
    return f"{PREFIX}.blob.{digest}.{index}"


def last_token(subject: str) -> str:
    """The device of `work.<device>`, the job of `log.<job>`."""
    return subject.rsplit(".", 1)[-1]
