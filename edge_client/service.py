"""The daemon's parts together: what it is asked, what it follows, what it says of itself.

It is silent while it has nothing to do: the scheduler wakes it.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from edge_client.config import Settings
from edge_client.engine import Engine, Restartable
from edge_client.following import Following
from edge_client.history import Link
from edge_client.models import Models
from edge_client.outbox import Outbox
from edge_client.replica import Device
from edge_client.reporting import About
from edge_client.rows import Rows
from edge_client.spool import Spool
from edge_client.working import Working
from shared import subjects
from shared.bus import Bus, Delivery, Streams
from shared.clock import Clock, SystemClock, jittered
from shared.codec import decode, encode
from shared.errors import RejectError, TransientError
from shared.logs import get
from shared.messages import STOPPED, UpdateKey, WakeUp
from shared.metrics import Counters
from shared.runtime import Stop

FINISH_S = 10.0
"""How long a drain waits for work in hand before it is abandoned."""
FAREWELL_S = 1.0
"""How long a drain tries to tell the scheduler not to count on this device."""
RETRY_S = 120.0
"""So long a job that was given up counts as a problem; then the scheduler may try again."""
ENDED_SPREAD_S = 2.0
"""Within this all devices of a job that has ended ask what is next."""
UNSURE_S = 60.0
"""A report that is older than this when the link comes back was heard."""

log = get("edge")


class Edge:
    """One device's daemon; `run` lasts until the stop."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        streams: Streams,
        spool: Spool,
        process: Restartable,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._settings = settings
        self._bus = bus
        self._spool = spool
        self.counters = Counters()
        self._report_due = asyncio.Event()
        self._told = b""
        self._told_at = 0.0
        self._engine = Engine(process, self.counters, timeout_s=settings.work_timeout_s)
        self._models = Models(settings.models, Path(settings.state_dir), streams, self.counters)
        self._about = About(settings, self.counters, self._models.known, self._report_due.set)
        self._outbox = Outbox(
            bus,
            spool,
            settings.device,
            self.counters,
            self._clock,
            lambda text: self._about.problem("spool", text),
        )
        self._followings: dict[str, Following] = {}
        self._rows = Rows(settings, self._about, self._clock, self._grown)
        self._device = Device(
            name=settings.device,
            rows=self._rows,
            threads=settings.threads,
            state_dir=Path(settings.state_dir),
            streams=streams,
            engine=self._engine,
            models=self._models,
            counters=self.counters,
            link=Link(),
            clock=self._clock,
            opened=self._about.opened,
        )
        self._working = Working(
            settings,
            bus,
            spool,
            self._outbox,
            self._about,
            self.counters,
            self._following,
            self._report_due,
            self._clock,
            last=_key(spool.ledger.last_spooled),
        )
        self._group = asyncio.TaskGroup()
        self._followers: set[asyncio.Task[None]] = set()

    async def run(self, stop: Stop) -> None:
        """Work until `stop`; what is in hand then is finished, or abandoned after a while."""
        device = self._settings.device
        for name in self._spool.bad:
            log.warning("spool_file_set_aside", file=name, why="torn, or not an update")
        await self._rows.count()
        async with (
            self._bus.subscribe(subjects.settled(device), gaps=True) as settlements,
            self._bus.subscribe(subjects.wake(device), limit=16) as calls,
        ):
            await self._report()
            async with self._group as group:
                working = group.create_task(self._working.run(stop))
                tasks = [
                    working,
                    group.create_task(self._outbox.settling(settlements, self._back)),
                    group.create_task(self._outbox.resending()),
                    group.create_task(self._waking(calls)),
                    group.create_task(self._reporting()),
                    group.create_task(self._indexing()),
                    group.create_task(self._rows.keep()),
                ]
                await stop.wait()
                self._about.problem("device", STOPPED)
                for following in self._followings.values():
                    following.stop()
                if self._working.in_hand:
                    await asyncio.wait({working}, timeout=FINISH_S)
                log.info("draining", abandoned=self._working.in_hand, spooled=len(self._spool))
                for task in (*tasks, *self._followers):
                    task.cancel()
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._report()
                await self._bus.flush()
        except (TimeoutError, TransientError) as error:
            log.warning("farewell_not_heard", why=str(error) or "no answer")

    def standing(self) -> tuple[bool, str]:
        """Whether the broker is there, and what this device does, for its supervisor."""
        link = "connected" if self._bus.connected else "waiting for the broker"
        jobs = ", ".join(sorted(self._followings)) or "no job"
        return self._bus.connected, f"{link}; {jobs}; {len(self._spool)} updates to settle"

    # What it follows

    def _following(self, job: str) -> Following:
        """The job is followed, from now on if it was not."""
        if job not in self._followings:
            following = Following(self._device, self._bus, job, self._group.create_task)
            self._followings[job] = following
            task = self._group.create_task(self._follow(following))
            self._followers.add(task)
            task.add_done_callback(self._followers.discard)
        return self._followings[job]

    async def _follow(self, following: Following) -> None:
        """Follow one job to its end; then the engine rests if no other is followed."""
        job = following.job
        log.info("following", job=job)
        await following.run()
        del self._followings[job]
        position = following.position.text() if following.position else ""
        if position:
            self._about.ended(job, position)
        later = asyncio.get_running_loop().call_later
        if following.problem:
            self._about.problem(f"job {job}", following.problem)
            later(RETRY_S, self._about.problem, f"job {job}", "")
        else:
            log.info("job_ended", job=job, position=position)
            self._about.problem(f"job {job}", "")
            self._about.speeds.forget(job)
            later(jittered(ENDED_SPREAD_S / 2, spread=1), self._woken)
        self._report_due.set()
        if not self._followings:
            await self._engine.rest()

    async def _grown(self) -> bool:
        """Every open job has seen what rows there are now; False where none is open."""
        held = [await following.look() for following in list(self._followings.values())]
        for one in held:
            if one is not None:
                self._about.opened(one)
        return any(held)

    # What it hears and says

    def _woken(self) -> None:
        self._working.wake.set()

    def _back(self) -> None:
        """The link was broken and is there again; what was said just before may be lost."""
        self._woken()
        if self._clock.now() - self._told_at < UNSURE_S:
            self._report_due.set()

    async def _waking(self, calls: AsyncIterator[Delivery]) -> None:
        async for delivery in calls:
            try:
                call = decode(delivery.data, WakeUp)
            except RejectError as error:
                self.counters.add("messages_malformed")
                log.warning("wake_malformed", why=str(error))
            else:
                log.debug("woken", job=call.job)
                self._woken()

    async def _reporting(self) -> None:
        """A report when something changed, and every `report_every_s`.

        One that would repeat the last is left out while requests for work show that the device is
        there: either alone is half of what an idle device sends.
        """
        every_s = self._settings.report_every_s
        while True:
            try:
                async with asyncio.timeout(jittered(every_s, spread=0.1)):
                    await self._report_due.wait()
            except TimeoutError:
                heard = self._clock.now() - self._working.answered_at < every_s
            else:
                heard = False
            self._report_due.clear()
            await self._report(unless_told=heard)

    async def _report(self, *, unless_told: bool = False) -> None:
        followed = ((job, following.position) for job, following in self._followings.items())
        self._about.stand({job: position.text() for job, position in followed if position})
        self.counters.put("reconnects", self._bus.reconnects)
        self.counters.put("deliveries_dropped", self._bus.dropped)
        if unless_told and encode(self._about.report()) == self._told:
            return  # bytes over the link are no news: each report would call for the next
        traffic = self._bus.traffic
        self.counters.put("link_bytes_in", traffic.bytes_in)
        self.counters.put("link_bytes_out", traffic.bytes_out)
        data = self._told = encode(self._about.report())
        self._told_at = self._clock.now()
        try:
            await self._bus.publish(subjects.report(self._settings.device), data)
        except TransientError as error:
            log.debug("report_not_sent", why=str(error))

    async def _indexing(self) -> None:
        """The report lists the device's models; reading them may take minutes, once."""
        if await self._models.index():
            self._report_due.set()


def _key(text: str) -> UpdateKey | None:
    """The UpdateKey that has this text."""
    parts = text.split(".")
    if len(parts) != 5:
        return None
    job, epoch, round, device, part = parts
    return UpdateKey(job, int(epoch), int(round), device, int(part))
