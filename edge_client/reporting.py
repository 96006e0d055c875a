"""What the device says of itself: its DeviceReport, and when a new one is due."""

import os
from collections.abc import Callable
from pathlib import Path

from edge_client.config import Settings
from edge_client.state import Speeds
from shared.engine.protocol import Opened
from shared.logs import get
from shared.messages import DeviceReport
from shared.metrics import Counters
from shared.runtime import project_version

OF_JOB = "job "
"""Begins the topic of a problem with one job."""
ENDED_SHOWN = 3
"""Final positions of so many jobs stay in the report."""

log = get("reporting")


class About:
    """Facts of the device; `changed` is called when one of them is worth a report."""

    def __init__(
        self,
        settings: Settings,
        counters: Counters,
        models: Callable[[], list[str]],
        changed: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._models = models
        self._counters = counters
        self._changed = changed
        self.speeds = Speeds()
        self._positions: dict[str, str] = {}
        self._ended: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._rows = self._heldout_rows = 0
        self._refused: set[str] = set()
        self._read = False

    def count_lines(self) -> None:
        """Rows are counted as lines until the engine has read them. Blocks: call it in a thread."""
        rows, heldout = _lines(self._settings.data), 0
        if self._settings.evaluates:
            heldout = _lines(self._settings.heldout)
        if not self._read:
            self._rows, self._heldout_rows = rows, heldout

    def opened(self, opened: Opened) -> None:
        """The engine has read the data for a job."""
        before = (self._read, self._rows, self._heldout_rows)
        self._read, self._rows, self._heldout_rows = True, opened.rows, opened.heldout_rows
        self._counters.put("rows_refused", opened.refused_rows)
        for refusal in opened.refused:
            if refusal not in self._refused:
                self._refused.add(refusal)
                log.warning("row_refused", row=refusal)
        if before != (True, opened.rows, opened.heldout_rows):
            self._changed()

    def problem(self, topic: str, text: str) -> None:
        """What keeps the device from helping, by topic; empty: nothing any more.

        A topic `job <name>` keeps it from that job alone.
        """
        if self._problems.get(topic, "") != text:
            self._problems[topic] = text
            if not text:
                del self._problems[topic]
            self._changed()

    def stand(self, positions: dict[str, str]) -> None:
        """Where the adapters of the followed jobs stand."""
        self._positions = positions

    def ended(self, job: str, position: str) -> None:
        """A job is followed no more; where its adapter stood at last."""
        self._ended.pop(job, None)
        self._ended[job] = position
        if len(self._ended) > ENDED_SHOWN:
            del self._ended[next(iter(self._ended))]

    def report(self) -> DeviceReport:
        """All of it, as of now."""
        settings = self._settings
        unable = {
            topic.removeprefix(OF_JOB): text[:2000]
            for topic, text in self._problems.items()
            if topic.startswith(OF_JOB)
        }
        general = [text for topic, text in self._problems.items() if not topic.startswith(OF_JOB)]
        return DeviceReport(
            device=settings.device,
            version=project_version()[:40],
            cores=_cores(),
            memory_mb=_memory_mb(),
            rows=self._rows,
            heldout_rows=self._heldout_rows if settings.trusted else 0,
            trusted=settings.trusted,
            models=self._models()[:64],
            speeds=self.speeds.report()[-64:],
            counters=dict(self._counters.snapshot()),
            problem="; ".join(general)[:2000],
            unable=dict(list(unable.items())[-64:]),
            positions=dict(list({**self._ended, **self._positions}.items())[-64:]),
        )


def _lines(path: str) -> int:
    """How many lines of a file hold something."""
    if not path:
        return 0
    try:
        with Path(path).open("rb") as file:
            return sum(not line.isspace() for line in file)
    except OSError as error:
        log.warning("data_unreadable", path=path, why=str(error))
        return 0


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_mb() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    except (OSError, ValueError):
        return 0
