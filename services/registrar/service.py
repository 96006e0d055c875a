"""Bus to state and back: journals what `state` decides, tells the broker, answers."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec

from services.registrar import refusals
from services.registrar.config import Settings
from services.registrar.journal import Journal
from services.registrar.refusals import Refusals, plain
from services.registrar.state import Accounts, Fact, State, hashed
from shared import subjects
from shared.bus import Bus, Delivery
from shared.clock import Clock
from shared.codec import decode, encode
from shared.errors import MalformedMessage, RejectError, TransientError
from shared.identity.authority import RegistrarKeys
from shared.identity.claims import Claims
from shared.identity.roles import AUTH_ERRORS, CLAIMS_UPDATE
from shared.logs import get
from shared.messages import (
    ConnectionRefused,
    DeviceRevoked,
    DevicesInvited,
    Enroll,
    Enrolled,
    IdentitiesListed,
    InviteDevices,
    ListIdentities,
    Message,
    Refused,
    RevokeDevice,
)
from shared.metrics import Counters
from shared.runtime import Stop, settle
from shared.service import report_counters

log = get("registrar")

TICK_S = 1.0
PUSH_S = 5.0
"""How long the broker may take to acknowledge a new token of an account."""
MAX_WAITING = 1024
GUESSES, GUESSES_A_SECOND = 50.0, 1.0
"""Refusals that are answered in a burst, and after it; further ones get no answer."""


class Registrar:
    """All identities of one fleet. One decision at a time."""

    def __init__(
        self,
        bus: Bus,
        system: Bus,
        keys: RegistrarKeys,
        journal: Journal,
        settings: Settings,
        clock: Clock,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`system` is connected to the broker's system account."""
        self.state = State()
        self.counters = Counters()
        self._bus = bus
        self._system = system
        self._keys = keys
        self._accounts = Accounts(fleet=keys.account, guests=keys.guests)
        self._journal = journal
        self._settings = settings
        self._clock = clock
        self._wall = wall
        self._refusals = Refusals()
        self._pushing = asyncio.Lock()
        self._pushed = False
        self._guesses = GUESSES

    async def serve(self, stop: Stop, ready: Callable[[], None] = lambda: None) -> None:
        """Read the journal, tell the broker what holds, then serve until `stop`."""
        for fact in self._journal.facts():
            self.state.evolve(fact)
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(task)
                for task in (
                    self._take(self._bus, subjects.ENROLL, self._on_enroll, "registrar"),
                    self._take(self._bus, f"{subjects.PREFIX}.identity.*", self._on_request),
                    self._take(self._system, AUTH_ERRORS, self._on_refusal),
                    self._ticks(),
                    report_counters(
                        self._bus,
                        "registrar",
                        self.counters,
                        self._clock,
                        self._settings.report_every_s,
                    ),
                )
            ]
            ready()
            log.info("registrar_ready", devices=len(self.state.devices))
            await stop.wait()
            for task in background:
                task.cancel()
        await self._bus.flush()

    async def _take(
        self,
        bus: Bus,
        subject: str,
        handler: Callable[[Delivery], Awaitable[object]],
        queue: str = "",
    ) -> None:
        async with bus.subscribe(subject, queue=queue, limit=MAX_WAITING) as deliveries:
            async for delivery in deliveries:
                await settle(handler(delivery), self.counters, what=subject)

    # ---- operators

    async def _on_request(self, delivery: Delivery) -> None:
        if delivery.subject == subjects.IDENTITY_REFUSED:
            await self._on_told(decode(delivery.data, ConnectionRefused))
            return
        try:
            answer = await self.answer(decode(delivery.data, Message))
        except RejectError as error:
            answer = Refused(reason=str(error))
        await self._reply(delivery, answer)

    async def answer(self, request: Message) -> Message:
        """What an operator's request comes to.

        Raises:
            RejectError: it cannot be done; the text names the mend.
        """
        match request:
            case InviteDevices():
                secret = secrets.token_urlsafe(16)
                self._keep(self.state.decide_invite(request, hashed(secret), self._wall()))
                log.info("devices_invited", uses=request.uses, device=request.device)
                return DevicesInvited(secret=secret, expires_s=request.expires_s)
            case RevokeDevice():
                return await self._revoke(request)
            case ListIdentities():
                return IdentitiesListed(
                    identities=self.state.listed(),
                    open_invitations=self.state.open_invitations(self._wall()),
                )
            case _:
                raise MalformedMessage(f"{type(request).__name__} is no request of an operator")

    async def _revoke(self, request: RevokeDevice) -> Message:
        fact = self.state.decide_revoke(request, self._wall())
        if fact is not None:
            self._keep(fact)
            self._pushed = False
            self.counters.add("devices_revoked")
            log.warning("device_revoked", device=request.device, public_key=fact.public_key)
        try:
            await self._push()
        except TransientError as error:
            raise RejectError(
                f"{request.device} is revoked here, but the broker has not said that it knows "
                f"({error}); it is told again until it does"
            ) from error
        key = self.state.devices[request.device].public_key
        return DeviceRevoked(device=request.device, public_key=key)

    # ---- devices

    async def _on_enroll(self, delivery: Delivery) -> None:
        request = decode(delivery.data, Enroll)
        try:
            answer: Message = self.enroll(request)
        except RejectError as error:
            self.counters.add("connections_refused")
            if self._guesses < 1.0:
                return
            self._guesses -= 1.0
            answer = Refused(reason=str(error))
            await self._tell(
                ConnectionRefused(
                    reason=f"not enrolled: {error}",
                    name=request.device,
                    public_key=request.public_key,
                )
            )
        await self._reply(delivery, answer)

    def enroll(self, request: Enroll) -> Enrolled:
        """The device's identity, the same however often it asks.

        Raises:
            RejectError: it gets none; the text says why.
        """
        fact = self.state.decide_enroll(request, self._wall())
        if fact is not None:
            self._keep(fact)
            self.counters.add("devices_enrolled")
            log.info("device_enrolled", device=request.device, public_key=request.public_key)
        known = self.state.devices[request.device]
        token = self._keys.device_token(known.device, known.public_key, known.at)
        return Enrolled(device=known.device, jwt=token)

    # ---- who was refused

    async def _on_refusal(self, delivery: Delivery) -> None:
        client, claims = refusals.read(delivery.data)
        self.counters.add("connections_refused")
        key = plain(claims.sub) if claims else ""
        await self._tell(
            ConnectionRefused(
                reason=self.state.why_refused(claims, self._accounts, self._wall()),
                name=plain(_called(client.name, claims)),
                host=plain(client.host),
                public_key=key,
                device=self.state.count_refused(key) or None,
            )
        )

    async def _on_told(self, message: ConnectionRefused) -> None:
        """Who runs the broker has seen one."""
        self.counters.add("connections_refused")
        reason, host = plain(message.reason), plain(message.host)
        await self._tell(ConnectionRefused(reason=reason, host=host))

    async def _tell(self, message: ConnectionRefused) -> None:
        told = self._refusals.take(message, self._clock.now())
        if told is not None:
            await self._publish_refusal(told)

    async def _publish_refusal(self, message: ConnectionRefused) -> None:
        log.warning("connection_refused", **msgspec.structs.asdict(message))
        await self._bus.publish(subjects.REFUSED, encode(message))

    # ---- what the broker must know

    async def _ticks(self) -> None:
        """The accounts' tokens are brought to the broker, again after each loss of it."""
        reconnects = self._system.reconnects
        while True:
            self._guesses = min(GUESSES, self._guesses + GUESSES_A_SECOND * TICK_S)
            if self._system.reconnects != reconnects:
                reconnects, self._pushed = self._system.reconnects, False
            await settle(self._push(), self.counters, what="accounts")
            for message in self._refusals.due(self._clock.now()):
                await settle(self._publish_refusal(message), self.counters, what="refusal")
            await self._clock.sleep(TICK_S)

    async def _push(self) -> None:
        """The broker holds the accounts as the journal has it.

        Raises:
            TransientError: it has not said so.
        """
        async with self._pushing:
            if self._pushed:
                return
            issued = self.state.decide_issue(self._wall())
            tokens = self._keys.account_tokens(self.state.revocations(), issued.at)
            # Whatever changes while the broker is asked is pushed the next time.
            self._pushed = True
            try:
                for token in tokens:
                    _check(
                        await self._system.request(CLAIMS_UPDATE, token.encode(), timeout_s=PUSH_S)
                    )
                self._keep(issued)
            except BaseException:
                self._pushed = False
                raise
            log.info("accounts_pushed", revoked=len(self.state.revocations()))

    def _keep(self, fact: Fact) -> None:
        """The fact is on disk and holds.

        Raises:
            TransientError: the disk does not take it.
        """
        try:
            self._journal.append(fact)
        except OSError as error:
            raise TransientError(f"the journal cannot be written: {error.strerror}") from error
        self.state.evolve(fact)

    async def _reply(self, delivery: Delivery, answer: Message) -> None:
        if delivery.reply:
            await self._bus.publish(delivery.reply, encode(answer))


class _Outcome(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    """What nats-server says to a new token."""

    data: _Outcome | None = None
    error: _Outcome | None = None


def _check(answer: bytes) -> None:
    try:
        said = msgspec.json.decode(answer, type=_Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransientError(f"not an answer of nats-server: {error}") from error
    if said.error is not None or said.data is None or said.data.code != 200:
        outcome = said.error or said.data or _Outcome()
        why = outcome.description or outcome.message or "no reason"
        raise TransientError(f"the broker does not take an account's token: {why}")


def _called(name: str, claims: Claims | None) -> str:
    """What a stranger calls itself."""
    return claims.name if claims and claims.name else name
