"""A connection for one command, and questions to the services over it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from services.console import access
from services.console.failure import EXIT_UNREACHABLE, Failure
from shared import nats_bus, subjects
from shared.bus import Bus
from shared.codec import decode_answer, encode
from shared.errors import RejectError, TransientError
from shared.jetstream_api import NoResponders
from shared.messages import Message

Answer = TypeVar("Answer", bound=Message)

CONNECT_S = 5.0
ANSWER_S = 15.0
START_S = 5.0
"""How long a service that is starting may leave its subjects unserved."""


_SERVES = {
    subjects.DEVICE_LIST: "scheduler",
    subjects.IDENTITY_INVITE: "registrar",
    subjects.IDENTITY_LIST: "registrar",
    subjects.IDENTITY_REVOKE: "registrar",
}


class Unanswered(Failure):
    """A service does not answer."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code=EXIT_UNREACHABLE)


@asynccontextmanager
async def connected(servers: str) -> AsyncGenerator[nats_bus.NatsBus]:
    """A bus to one of `servers`, which are separated by commas; closed at the end.

    Raises:
        Failure: none of them answers, or a service that was asked something did not.
    """
    named = [server.strip() for server in servers.split(",")]
    addresses = ", ".join(map(shown, named))
    try:
        credentials = access.credentials(named)
        bus = await nats_bus.connect(
            named, name="console", credentials=credentials, patience_s=CONNECT_S
        )
    except TransientError as error:
        why = f" ({error})" if str(error) else ""
        raise Failure(
            f"no broker lets us in at {addresses}{why}; start one with "
            "`seedwire up`, or name yours with --servers or SEEDWIRE_SERVERS",
            code=EXIT_UNREACHABLE,
        ) from error
    try:
        yield bus
    except Unanswered as error:
        raise Unanswered(f"{error} at {addresses}; is `seedwire up` running?") from error
    finally:
        await bus.close()


async def ask(bus: Bus, subject: str, message: Message, expected: type[Answer]) -> Answer:
    """A service's answer; one that is just starting is waited for.

    Raises:
        Unanswered: nobody serves the subject, or not in time.
        Failure: it refused, or the answer cannot be read.
    """
    try:
        data = await _answer(bus, subject, encode(message))
        return decode_answer(data, message, expected)
    except TransientError as error:
        service = _SERVES.get(subject, "aggregator")
        raise Unanswered(f"the {service} does not answer") from error
    except RejectError as error:
        raise Failure(str(error)) from error


async def _answer(bus: Bus, subject: str, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    patient_until = loop.time() + START_S
    while True:
        try:
            return await bus.request(subject, data, timeout_s=ANSWER_S)
        except NoResponders:
            if loop.time() >= patient_until:
                raise
            await asyncio.sleep(0.2)


def shown(server: str) -> str:
    """A server's address without user and password."""
    parts = urlsplit(server)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
