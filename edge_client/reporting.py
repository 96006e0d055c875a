"""What the device says of itself: its DeviceReport, and when a new one is due."""

import os
from collections.abc import Callable

from edge_client.config import Settings
from edge_client.state import Speeds
from shared.dataset import no_row_yet
from shared.engine.protocol import Held
from shared.logs import get
from shared.messages import DeviceReport
from shared.metrics import Counters
from shared.runtime import project_version

OF_JOB = "job "
"""Begins the topic of a problem with one job."""
ENDED_SHOWN = 3
"""Final positions of so many jobs stay in the report."""

REFUSALS_LOGGED = 5
"""Of the refused rows of one reading, so many are logged; the rest are counted."""

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
        self._news = (0, 0)
        """The numbers of rows that a report was last asked for."""
        self._refused: set[str] = set()

    def counted(self, rows: int, heldout: int) -> None:
        """So many records are there, usable or not: the rows until the engine has read them.

        Data that grows by the second is no news by the second: a tenth more or less is.
        """
        self._rows, self._heldout_rows = rows, heldout
        settings = self._settings
        waits = "" if rows or heldout else no_row_yet(settings.data or settings.heldout)
        self.problem("rows", waits)
        now = (rows, heldout)
        if any(10 * abs(new - old) > old for new, old in zip(now, self._news, strict=True)):
            self._news = now
            self._changed()

    def opened(self, held: Held) -> None:
        """The engine has read the data for a job."""
        self._counters.put("rows_refused", held.refused_rows)
        news = [one for one in dict.fromkeys(held.refused) if one not in self._refused]
        self._refused.update(news)
        for refusal in news[:REFUSALS_LOGGED]:
            log.warning("row_refused", row=refusal)
        if news:
            usable = held.rows + held.heldout_rows
            log.warning("rows_refused", count=held.refused_rows, of=usable + held.refused_rows)
        self.counted(held.rows, held.heldout_rows)

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


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_mb() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
    except (OSError, ValueError):
        return 0
