"""The hand of the daemon: asks for work, waits for the adapter, measures, hands the update over.

One piece at a time. Work that cannot be done is declined with the reason in the next request.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from edge_client.config import Settings
from edge_client.engine import EngineLost
from edge_client.evaluating import evaluate
from edge_client.following import Following
from edge_client.measured import Ask, Measured
from edge_client.outbox import Outbox
from edge_client.probing import probe
from edge_client.reporting import About
from edge_client.spool import Spool
from edge_client.walking import walk
from shared import subjects
from shared.bus import Bus
from shared.clock import Clock, backoff_s, jittered
from shared.codec import decode, encode
from shared.errors import EngineDied, EngineError, MalformedMessage, TransientError
from shared.logs import get
from shared.messages import (
    ComeBack,
    EvaluateResult,
    EvaluateWork,
    Message,
    ProbeWork,
    RequestWork,
    UpdateKey,
    WalkWork,
    WorkAssigned,
)
from shared.metrics import Counters
from shared.runtime import Stop

REQUEST_S = 5.0
SILENCE_CAP_S = 60.0
"""Longest pause while nobody answers."""
FRUITLESS_CAP_S = 30.0
"""Longest pause after work that came to nothing."""
DEATHS = 2
"""Work that ended the engine so often is declined."""

_KINDS = {ProbeWork: "probe", WalkWork: "walk", EvaluateWork: "evaluate"}

log = get("working")


class Declined(Exception):
    """Assigned work cannot be done here; the text says why."""


@dataclass(eq=False)
class Working:
    """`wake` ends any pause; `in_hand` is true from the measurement until the update is sent.

    `answered_at`: when the scheduler last answered, by `clock`.
    """

    settings: Settings
    bus: Bus
    spool: Spool
    outbox: Outbox
    about: About
    counters: Counters
    following: Callable[[str], Following]
    report: asyncio.Event
    clock: Clock
    last: UpdateKey | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    in_hand: bool = False
    answered_at: float = -1e9
    _declined: str = ""

    async def run(self, stop: Stop) -> None:
        """Work until `stop`; what is in hand then is finished first."""
        unanswered = fruitless = 0
        idle = 1  # turned away so often in a row; the first time is told, later the second
        while not stop.asked:
            self.wake.clear()
            try:
                answer = await self._request()
            except TransientError as error:
                unanswered += 1
                log.debug("work_not_answered", why=str(error), times=unanswered)
                await self._pause(backoff_s(unanswered, cap_s=SILENCE_CAP_S))
                continue
            except Declined as why:
                answer = why
            unanswered = 0
            if isinstance(answer, ComeBack):
                fruitless = 0
                log.debug("come_back", after_s=answer.after_s, reason=answer.reason)
                if answer.report:
                    self.report.set()
                else:
                    idle += 1
                    if idle == 2:
                        log.info("waiting_for_work", why=answer.reason)
                await self._pause(jittered(answer.after_s, spread=0.2))
                continue
            idle = 0
            if await self._did(answer):
                fruitless = 0
            else:
                fruitless += 1
                await self._pause(backoff_s(fruitless, first_s=0.05, cap_s=FRUITLESS_CAP_S))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wake.wait()

    async def _request(self) -> WorkAssigned | ComeBack:
        """What the scheduler answers.

        Raises:
            TransientError: nobody answered.
            Declined: the answer is of a kind that this version does not know.
        """
        request = RequestWork(
            device=self.settings.device,
            kinds=self.settings.kinds,
            last=self.last,
            spooled=len(self.spool),
            declined=self._declined,
        )
        subject = subjects.work(self.settings.device)
        data = await self.bus.request(subject, encode(request), timeout_s=REQUEST_S)
        self._declined, self.answered_at = "", self.clock.now()
        try:
            answer = decode(data, Message)
        except MalformedMessage as error:
            raise Declined(f"a kind of work that this version does not know: {error}") from error
        if not isinstance(answer, WorkAssigned | ComeBack):
            raise Declined(f"{type(answer).__name__} is no answer to a request for work")
        return answer

    async def _did(self, answer: WorkAssigned | Declined) -> bool:
        """Whether the work became an update."""
        try:
            if isinstance(answer, Declined):
                raise answer
            self.last = answer.key
            measured = await self._measured(answer)
        except Declined as why:
            self._declined = str(why)[:400]
            self.counters.add("work_declined")
            log.warning("work_declined", why=self._declined)
            return False
        finally:
            self.in_hand = False
        return measured

    async def _measured(self, assigned: WorkAssigned) -> bool:
        """Do the work; False where the adapter has passed it or the update is in the spool already.

        Raises:
            Declined: it cannot be done here.
        """
        key, work = assigned.key, assigned.work
        kind = _KINDS[type(work)]
        if key.device != self.settings.device:
            raise Declined(f"the key is of device {key.device}")
        if kind not in self.settings.kinds:
            raise Declined(f"this device does no work of kind {kind}: it has no rows for it")
        measured = await self._at_the_adapter(assigned, lambda ask: _perform(assigned, ask))
        if measured is None:
            return False
        log.info("work_measured", job=key.job, round=key.round, part=key.part, kind=kind)
        result = measured.result
        if not isinstance(result, EvaluateResult):
            self.counters.add("probes_dropped", result.dropped)
        self.counters.add("tokens_forward", measured.passes)
        await self.outbox.keep(measured.update(assigned))
        self.about.problem(f"job {key.job}", "")
        if self.about.speeds.learn(key.job, measured.what, measured.unit_s):
            self.report.set()
        return True

    async def _at_the_adapter(
        self, assigned: WorkAssigned, work: Callable[[Ask], Awaitable[Measured]]
    ) -> Measured | None:
        key, deaths = assigned.key, 0
        following = self.following(key.job)
        while True:
            try:
                async with asyncio.timeout(max(assigned.deadline_s, 1.0)):
                    verdict = await following.reaches(assigned, self.spool)
                if verdict != "do":
                    log.info("work_dropped", job=key.job, round=key.round, why=verdict)
                    if verdict == "held":
                        await self.outbox.send(key.text())
                    return None
                self.in_hand = True
                measured = await following.measure(assigned, work)
                if measured is not None:
                    return measured
            except TimeoutError:
                raise Declined(
                    f"round {key.round} was not reached within its deadline: {following.doing}"
                ) from None
            except EngineLost:
                pass
            except EngineDied as error:
                deaths += 1
                if deaths >= DEATHS:
                    self.counters.add("engine_refusals")
                    raise Declined(f"this work ended the engine {deaths} times: {error}") from error
            except EngineError as error:
                self.counters.add("engine_refusals")
                raise Declined(str(error)) from error
            self.in_hand = False


async def _perform(assigned: WorkAssigned, ask: Ask) -> Measured:
    match assigned.work:
        case ProbeWork() as work:
            return await probe(assigned, work, ask)
        case WalkWork() as work:
            return await walk(assigned, work, ask)
        case EvaluateWork():
            return await evaluate(assigned, ask)
