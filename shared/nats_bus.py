"""A connection to a NATS server that never gives up; the only importer of nats.

nats-py's own reconnecting is off: it ends for good on some errors of the server and after its
count of attempts. Here a closed client is replaced by a new one, with every subscription on it.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from shared.bus import INBOXES, Delivery, Traffic
from shared.clock import backoff_s
from shared.credentials import (
    CONNECT_TIMEOUT_S,
    OUTGOING_BYTES,
    Credentials,
    client_options,
    needs_tls,
)
from shared.errors import ConfigError, TransientError
from shared.identity.roles import EARS, heard_as, published_as
from shared.jetstream import JetStream
from shared.jetstream_api import NoAnswer, NoResponders
from shared.logs import get
from shared.mailbox import Mailbox

IN_VAIN_FIRST_S, IN_VAIN_CAP_S = 0.5, 15.0
"""Backoff while the broker refuses us, or we it: somebody has to mend that."""
IN_VAIN_TOLD_EVERY_S = 60.0
SILENCE_S = 20
"""How long an overdue answer and an unanswered ping are put down to a slow link."""
NO_TLS = "the broker offers no TLS, and our settings want it"
LOST = "not connected to the broker: it is tried again all the time"

_log = get("bus")


class _Client(Client):
    """Tells nobody who it is but under TLS, where TLS is wanted; outlives headers that are none.

    nats-py goes on in the clear with whoever offers no TLS, and an attacker would not. Headers that
    it cannot read end its reading without a word, and any device may send such.
    """

    def __init__(self, *, needs_tls: bool, closed: Callable[[], None]) -> None:
        """`closed` is called when it is: nats-py calls nobody where it had more to send."""
        super().__init__()
        self._needs_tls = needs_tls
        self._closed = closed

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        try:
            await super()._close(status, do_cbs)
        finally:
            self._closed()

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            _log.warning("headers_unreadable", why=str(error))
            return None

    def _connect_command(self) -> bytes:
        assert self._current_server is not None
        covered = self._server_info.get("tls_required") or self._current_server.uri.scheme == "wss"
        if self._needs_tls and not covered:
            raise nats.errors.Error(NO_TLS)
        return super()._connect_command()


@dataclass(eq=False, slots=True)
class _Subscribed:
    subject: str
    queue: str
    mailbox: Mailbox
    client: Client | None = None
    active: Subscription | None = None


async def connect(
    servers: list[str],
    *,
    name: str,
    credentials: Credentials | None = None,
    ping_interval_s: int = 60,
    timeout_s: float = 5.0,
    ack_wait_s: float = 30.0,
    patience_s: float | None = None,
) -> "NatsBus":
    """A bus that is connected; waits for the broker for as long as that takes, or `patience_s`.

    Raises:
        ConfigError: an address or the credentials cannot be used.
        TransientError: patience has run out; the text says what went wrong last, if anything did.
    """
    bus = NatsBus(
        servers,
        name=name,
        credentials=credentials or Credentials(),
        ping_interval_s=ping_interval_s,
        timeout_s=timeout_s,
        ack_wait_s=ack_wait_s,
    )
    try:
        async with asyncio.timeout(patience_s):
            await bus.start()
    except TimeoutError as error:
        await bus.close()
        raise TransientError(bus.failure) from error
    except BaseException:
        await bus.close()
        raise
    return bus


class NatsBus(JetStream):
    """`Bus` and `Streams` against a real server; made by `connect`."""

    def __init__(
        self,
        servers: list[str],
        *,
        name: str,
        credentials: Credentials,
        ping_interval_s: int,
        timeout_s: float,
        ack_wait_s: float,
    ) -> None:
        super().__init__(timeout_s=timeout_s, ack_wait_s=ack_wait_s)
        self._name = name
        self._options = client_options(servers, name, credentials, ping_interval_s)
        self._needs_tls = needs_tls(servers, credentials)
        self._reserved_ears = credentials.has_reserved_ears()
        self.failure = ""
        """Why the last attempt to connect failed."""
        self._mend = credentials.mend
        self._in_vain_told_at = -IN_VAIN_TOLD_EVERY_S
        self._shown = [server.rsplit("@", 1)[-1] for server in servers]  # no passwords in logs
        self._client: Client | None = None
        self._up = asyncio.Event()
        self._attention = asyncio.Event()
        self._connections = 0
        self._dropped = 0
        self._earlier = Traffic()
        """Of the clients that are gone."""
        self._closed = False
        self._closing = False
        self._supervisor: asyncio.Task[None] | None = None
        self._subscribed: list[_Subscribed] = []
        self._outgoing: deque[tuple[str, bytes, Mapping[str, str] | None]] = deque()
        self._outgoing_bytes = 0
        self._inbox = f"{self._options['inbox_prefix']}.{secrets.token_urlsafe(6)}"
        self._replies: dict[str, Mailbox] = {}
        self._inboxes: list[Mailbox] = []
        self._numbers = 0

    async def start(self) -> None:
        """Connect, and stay connected until `close`."""
        self._supervisor = asyncio.create_task(self._supervise(), name=f"bus of {self._name}")
        await self._up.wait()
        if self._supervisor.done():
            self._supervisor.result()

    # The connection

    async def _supervise(self) -> None:
        """Keep a client connected; whatever ends this ends every subscription."""
        client: Client | None = None
        try:
            while True:
                client = await self._connected_client()
                self._client = client
                self._connections += 1
                self._up.set()
                _log.info("broker_connected", bus=self._name, connections=self._connections)
                await self._lost(client)
                self._earlier = _plus(self._earlier, client)
                self._went_down()
                why = str(client.last_error or "closed by the server")
                _log.warning("broker_lost", bus=self._name, why=why)
                await _close(client)
        finally:
            self._closed = True
            self._earlier = self.traffic
            self._went_down()
            for subscribed in self._subscribed:
                subscribed.mailbox.close()
            self._up.set()
            if client is not None:
                await _close(client)

    async def _connected_client(self) -> Client:
        """A new client that is connected and has every subscription; tried for ever."""
        attempt = 0
        while not self._closing:
            client = _Client(needs_tls=self._needs_tls, closed=self._attention.set)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S * 4):
                    await client.connect(error_cb=self._on_error, **self._options)
                    await self._attach_everything(client)
            except (OSError, EOFError, nats.errors.Error, TimeoutError, ValueError) as error:
                self.failure = why = str(client.last_error or error) or type(error).__name__
                self._earlier = _plus(self._earlier, client)
                await _close(client)
            except BaseException:
                await _close(client)
                raise
            else:
                return client
            if (event := _in_vain(why)) is not None:
                self._tell_in_vain(event, why)
                await asyncio.sleep(
                    backoff_s(attempt, first_s=IN_VAIN_FIRST_S, cap_s=IN_VAIN_CAP_S)
                )
                attempt += 1
                continue
            report = _log.debug if attempt % 10 else _log.warning
            report("broker_unreachable", bus=self._name, servers=self._shown, why=why)
            await asyncio.sleep(backoff_s(attempt, first_s=0.05, cap_s=4.0))
            attempt += 1
        raise asyncio.CancelledError

    def _tell_in_vain(self, event: str, why: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._in_vain_told_at >= IN_VAIN_TOLD_EVERY_S:
            self._in_vain_told_at = now
            _log.warning(event, bus=self._name, why=why, mend=self._mend)

    async def _attach_everything(self, client: Client) -> None:
        """All that waited for a connection has it; nothing new waits when this returns."""
        await client.subscribe(f"{self._inbox}.*", cb=self._on_reply)
        while True:
            for subscribed in [one for one in self._subscribed if one.client is not client]:
                await self._attach(client, subscribed)
                subscribed.mailbox.mark_gap()
            while self._outgoing:
                subject, data, headers = self._outgoing[0]
                await client.publish(subject, data, headers=_headers(headers))
                self._outgoing.popleft()
                self._outgoing_bytes -= len(data)
            await client.flush(CONNECT_TIMEOUT_S)
            if not self._outgoing and all(one.client is client for one in self._subscribed):
                return

    async def _lost(self, client: Client) -> None:
        """Return when the connection is gone: closed, or silent even to a ping."""
        while not client.is_closed:
            self._attention.clear()
            await self._attention.wait()
            if client.is_closed:
                return
            received = client.stats["in_msgs"]
            try:
                await client.flush(SILENCE_S)
            except (nats.errors.Error, OSError):
                if client.stats["in_msgs"] == received:
                    return

    def _went_down(self) -> None:
        self._up.clear()
        self._client = None
        for mailbox in (*self._replies.values(), *self._inboxes):
            mailbox.close()
        self._inboxes.clear()

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self._dropped += 1
        elif "ermissions" in str(error):
            _log.warning("broker_forbids", bus=self._name, why=str(error))
        else:
            _log.debug("broker_error", bus=self._name, why=str(error) or type(error).__name__)

    # Bus

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def reconnects(self) -> int:
        return max(self._connections - 1, 0)

    @property
    def dropped(self) -> int:
        return self._dropped

    @property
    def traffic(self) -> Traffic:
        return _plus(self._earlier, self._client) if self._client else self._earlier

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        if self._closed:
            raise TransientError("the connection to the broker was closed")
        if self._client is not None and self._client.is_connected and not self._outgoing:
            await self._publish(self._client, subject, data, "", headers)
            return
        if self._outgoing_bytes + len(data) > OUTGOING_BYTES:
            raise TransientError(f"{LOST}; {OUTGOING_BYTES} bytes wait already")
        self._outgoing.append((subject, data, headers))
        self._outgoing_bytes += len(data)

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        return (await self.ask(subject, data, timeout_s=timeout_s)).data

    @asynccontextmanager
    async def subscribe(
        self, subject: str, *, queue: str = "", limit: int = 4096, gaps: bool = False, each: int = 0
    ) -> AsyncGenerator[AsyncIterator[Delivery], None]:
        subscribed = _Subscribed(subject, queue, Mailbox(limit, gaps=gaps, each=each))
        self._subscribed.append(subscribed)
        if self._closed:
            subscribed.mailbox.close()
        try:
            if self._client is not None:
                await self._try(self._attach(self._client, subscribed))
                await self._try(self._client.flush(CONNECT_TIMEOUT_S))
            yield subscribed.mailbox
        finally:
            self._subscribed.remove(subscribed)
            subscribed.mailbox.close()
            if subscribed.active is not None and self.connected:
                await self._try(subscribed.active.unsubscribe())

    async def flush(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                client = await self._ready_client()
                await client.flush(CONNECT_TIMEOUT_S)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise TransientError(f"the broker did not answer a ping: {error}") from error

    async def close(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        self._closing = True
        while not supervisor.done():  # nats-py swallows a cancellation now and then
            supervisor.cancel()
            await asyncio.wait([supervisor], timeout=CONNECT_TIMEOUT_S + 1)
        if not supervisor.cancelled():
            supervisor.result()

    # JetStream

    async def send(self, subject: str, data: bytes, *, reply: str = "") -> None:
        client = self._client
        if client is None or not client.is_connected:
            raise TransientError(LOST)
        await self._publish(client, subject, data, reply, None)

    async def ask(
        self,
        subject: str,
        data: bytes,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Delivery:
        client: Client | None = None
        try:
            async with asyncio.timeout(timeout_s):
                client = await self._ready_client()
                with self.replies(1) as (reply, mailbox):
                    await self._publish(client, subject, data, reply, headers)
                    answer = await anext(mailbox, None)
        except TimeoutError as error:
            if client is None:
                raise TransientError(LOST) from error
            self._attention.set()
            raise NoAnswer(f"no answer on {subject} within {timeout_s:g} s") from error
        if answer is None:
            raise TransientError(f"the connection was lost before an answer on {subject}")
        if answer.headers.get("Status") == "503" and not answer.data:
            raise NoResponders(f"nobody serves {subject}: start the service that does")
        return answer

    @contextmanager
    def replies(self, limit: int) -> Generator[tuple[str, Mailbox], None, None]:
        self._numbers += 1
        subject = f"{self._inbox}.{self._numbers}"
        mailbox = self._replies[subject] = Mailbox(limit)
        if self._client is None:
            mailbox.close()
        try:
            yield subject, mailbox
        finally:
            del self._replies[subject]

    async def open_inbox(self, limit: int) -> tuple[str, Mailbox]:
        client = self._client
        if client is None:
            raise TransientError(LOST)
        self._numbers += 1
        prefix = f"{self._inbox}.{self._numbers}"
        mailbox = Mailbox(limit)
        self._inboxes = [one for one in self._inboxes if not one.closed]
        self._inboxes.append(mailbox)
        try:
            await client.subscribe(f"{prefix}.*", cb=self._into(mailbox))
        except (nats.errors.Error, OSError) as error:
            raise TransientError(LOST) from error
        return prefix, mailbox

    # Between nats-py and here

    async def _ready_client(self) -> Client:
        while self._client is None or not self._client.is_connected:
            if self._closed:
                raise TransientError("the connection to the broker was closed")
            await self._up.wait()
            if self._client is not None and not self._client.is_connected:
                await asyncio.sleep(0.01)  # lost, and about to be noticed
        return self._client

    async def _attach(self, client: Client, subscribed: _Subscribed) -> None:
        if subscribed.client is client:
            return
        subscribed.client = client
        subject = subscribed.subject
        active = await client.subscribe(
            heard_as(subject) if self._reserved_ears else subject,
            queue=subscribed.queue,
            cb=self._into(subscribed.mailbox, answered=INBOXES),
        )
        subscribed.active = active
        if subscribed not in self._subscribed:
            await active.unsubscribe()

    def _into(
        self, mailbox: Mailbox, answered: str | tuple[str, ...] = ""
    ) -> Callable[[Msg], Awaitable[None]]:
        """Puts what comes into `mailbox`; only where `answered` begins is an answer sent."""

        async def deliver(message: Msg) -> None:
            if not message.reply.startswith(answered):
                message.reply = ""
            if self._reserved_ears and message.subject.startswith(EARS):
                message.subject = published_as(message.subject)
            if not mailbox.put(_delivery(message)):
                self._dropped += 1

        return deliver

    async def _on_reply(self, message: Msg) -> None:
        mailbox = self._replies.get(message.subject)
        if mailbox is not None:
            mailbox.put(_delivery(message))

    async def _publish(
        self,
        client: Client,
        subject: str,
        data: bytes,
        reply: str,
        headers: Mapping[str, str] | None,
    ) -> None:
        if client.pending_data_size > OUTGOING_BYTES:
            raise TransientError("the link is slower than what is sent: wait")
        try:
            await client.publish(subject, data, reply=reply, headers=_headers(headers))
        except nats.errors.MaxPayloadError as error:
            raise ConfigError(
                f"{len(data)} bytes on {subject}, and the broker takes {client.max_payload}: "
                "raise max_payload in nats-server's configuration"
            ) from error
        except (nats.errors.Error, OSError) as error:
            raise TransientError(f"{LOST} ({error})") from error

    async def _try(self, awaitable: Awaitable[object]) -> None:
        """Done if the connection holds; if not, the next connection does it."""
        try:
            await awaitable
        except (nats.errors.Error, OSError) as error:
            _log.debug("broker_error", bus=self._name, why=str(error))


def _in_vain(why: str) -> str | None:
    """What to tell of a failure that trying again alone will not mend; None for any other."""
    if "uthorization" in why or "uthentication" in why:
        return "broker_refuses_us"
    if "CERTIFICATE_VERIFY_FAILED" in why or NO_TLS in why:
        return "broker_not_trusted"
    return None


def _delivery(message: Msg) -> Delivery:
    # str(): nats-py has an enum among the names of headers.
    headers = {str(getattr(k, "value", k)): v for k, v in (message.headers or {}).items()}
    return Delivery(message.subject, message.data, headers, message.reply)


def _plus(earlier: Traffic, client: Client) -> Traffic:
    stats = client.stats
    return Traffic(earlier.bytes_in + stats["in_bytes"], earlier.bytes_out + stats["out_bytes"])


def _headers(headers: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(headers) if headers else None


async def _close(client: Client) -> None:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await client.close()
    except (nats.errors.Error, OSError, TimeoutError) as error:
        _log.debug("broker_close_failed", why=str(error))
