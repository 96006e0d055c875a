"""Updates on their way: into the spool, to the broker, again and again, until they are settled.

A publish is plain: stream UPDATES takes it in, and what is lost is sent again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from edge_client.spool import Spool, SpoolFull
from edge_client.state import RESEND_CAP_S, RESEND_FIRST_S, Resends
from shared import subjects
from shared.bus import GAP, Bus, Delivery
from shared.clock import Clock
from shared.codec import decode
from shared.errors import TransientError
from shared.logs import get
from shared.messages import SubmitUpdate, UpdateSettled
from shared.metrics import Counters
from shared.runtime import settle

log = get("outbox")


class Outbox:
    """The spool and what is sent from it; `trouble` is told what is wrong with it, or `""`."""

    def __init__(
        self,
        bus: Bus,
        spool: Spool,
        device: str,
        counters: Counters,
        clock: Clock,
        trouble: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._spool = spool
        self._device = device
        self._counters = counters
        self._clock = clock
        self._trouble = trouble
        self._disk = asyncio.Lock()
        self._hurry = asyncio.Event()
        self._resends = Resends()
        for key in spool.keys:
            self._resends.add(key, clock.now())

    async def keep(self, update: SubmitUpdate) -> None:
        """`update` is durable and has been sent once; waits for as long as the disk is full."""
        key, wait_s = update.key.text(), RESEND_FIRST_S
        while True:
            try:
                async with self._disk:
                    dropped = await asyncio.to_thread(self._spool.put, update)
                break
            except SpoolFull as error:
                if wait_s == RESEND_FIRST_S:
                    self._counters.add("spool_full")
                self._trouble(str(error))
                log.error("spool_full", key=key, why=str(error), again_s=wait_s)
                await self._clock.sleep(wait_s)
                wait_s = min(RESEND_CAP_S, 2 * wait_s)
        self._trouble("")
        self._counters.add("updates_measured")
        for lost in dropped:
            self._resends.forget(lost)
            self._counters.add("updates_superseded")
            log.warning("update_superseded", key=lost, why="the spool is full: max_spool_bytes")
        self._resends.add(key, self._clock.now())
        await self.send(key)

    async def send(self, key: str) -> None:
        """`key` has been handed to the broker if there is a link; else it stays due."""
        if not self._bus.connected:
            return
        data, job = None, self._spool.job(key)
        if job:  # asked first: the spool may have let go of the key when it has been read
            data = await asyncio.to_thread(self._spool.read, key)
        if data is None:  # settled or dropped meanwhile, or its file is gone
            self._resends.forget(key)
            return
        subject = subjects.update(job, self._device)
        try:
            await self._bus.publish(subject, data, {subjects.KEY_HEADER: key})
        except TransientError as error:
            log.debug("update_not_sent", key=key, why=str(error))
        else:
            self._counters.add("updates_sent")
        self._resends.sent(key, self._clock.now())
        self._hurry.set()

    async def resending(self) -> None:
        """What is due is sent, for ever; sleeps while nothing waits."""
        while True:
            for key in self._resends.due(self._clock.now()):
                await self.send(key)
            self._hurry.clear()
            wait_s = self._resends.next_s(self._clock.now())
            if self._spool.untold and not await self._told():
                wait_s = RESEND_CAP_S if wait_s is None else min(wait_s, RESEND_CAP_S)
            if wait_s is not None and not self._bus.connected:
                wait_s = max(wait_s, RESEND_FIRST_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._hurry.wait()

    async def _told(self) -> bool:
        """Whether the ledger has all that it had no room for."""
        try:
            async with self._disk:
                await asyncio.to_thread(self._spool.tell)
        except OSError as error:
            log.debug("ledger_still_full", why=str(error))
            return False
        return True

    async def settling(
        self, settlements: AsyncIterator[Delivery], back: Callable[[], None]
    ) -> None:
        """Each settled update is forgotten; after a reconnect all are sent, and `back` is told."""
        async for delivery in settlements:
            if delivery is GAP:
                with contextlib.suppress(TransientError):
                    await self._bus.flush()
                self._resends.hurry(self._clock.now())
                self._hurry.set()
                back()
                continue
            await settle(self._settled(delivery.data), self._counters, what="UpdateSettled")

    async def _settled(self, data: bytes) -> None:
        settled = decode(data, UpdateSettled)
        self._resends.forget(settled.key)
        try:
            async with self._disk:
                held = await asyncio.to_thread(self._spool.settle, settled.key, settled.outcome)
        except OSError as error:
            log.error("settle_not_written", key=settled.key, why=str(error))
            if settled.key in self._spool:  # its word is asked for again, when there may be room
                self._resends.add(settled.key, self._clock.now())
                self._resends.sent(settled.key, self._clock.now())
            self._hurry.set()
            return
        if not held:
            log.debug("settled_before", key=settled.key, outcome=settled.outcome)
        elif settled.outcome == "rejected":
            log.warning("update_rejected", key=settled.key, reason=settled.reason)
        else:
            log.debug("update_settled", key=settled.key, outcome=settled.outcome)
