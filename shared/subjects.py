"""Every subject, stream and queue name; nothing else spells one."""

import re

PREFIX = "seedwire.v1"
NAME = re.compile(r"^[A-Za-z0-9_-]{1,64}$")
"""What a job or device may be called: one subject token."""

LOG_STREAM = "LOG"
DETAIL_STREAM = "DETAIL"
UPDATES_STREAM = "UPDATES"
BLOBS_STREAM = "BLOBS"

KEY_HEADER = "Seedwire-Key"
"""Names an update's key outside its body, so that an undecodable one can be settled too."""

JOB_SUBMIT = f"{PREFIX}.job.submit"
JOB_STOP = f"{PREFIX}.job.stop"
JOB_LIST = f"{PREFIX}.job.list"
DEVICE_LIST = f"{PREFIX}.device.list"

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
    return f"{PREFIX}.update.{job}.{device}"


def settled(device: str) -> str:
    return f"{PREFIX}.settled.{device}"


def work(device: str) -> str:
    return f"{PREFIX}.work.{device}"


def wake(device: str) -> str:
    return f"{PREFIX}.wake.{device}"


def report(device: str) -> str:
    return f"{PREFIX}.report.{device}"


def decision(job: str) -> str:
    return f"{PREFIX}.decision.{job}"


def service(name: str) -> str:
    return f"{PREFIX}.service.{name}"


def blob(digest: str, index: int) -> str:
    return f"{PREFIX}.blob.{digest}.{index}"


def last_token(subject: str) -> str:
    """The device of `work.<device>`, the job of `log.<job>`."""
    return subject.rsplit(".", 1)[-1]
