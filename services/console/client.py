"""A connection for one command, and questions to the services over it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from services.console.failure import EXIT_UNREACHABLE, Failure
from shared import nats_bus
from shared.bus import Bus
from shared.codec import decode, encode
from shared.errors import MalformedMessage, TransientError
from shared.messages import Message, Refused

Answer = TypeVar("Answer", bound=Message)

CONNECT_S = 5.0
ANSWER_S = 15.0


@asynccontextmanager
async def connected(servers: list[str]) -> AsyncGenerator[nats_bus.NatsBus]:
    """A bus to one of `servers`, closed at the end.

    Raises:
        Failure: none of them answers.
    """
    try:
        async with asyncio.timeout(CONNECT_S):
            bus = await nats_bus.connect(servers, name="console")
    except TimeoutError as error:
        raise Failure(
            f"no broker lets us in at {', '.join(map(shown, servers))}; start one with "
            "`seedwire up`, or name yours with --servers or SEEDWIRE_SERVERS",
            code=EXIT_UNREACHABLE,
        ) from error
    try:
        yield bus
    finally:
        await bus.close()


async def ask(bus: Bus, subject: str, message: Message, expected: type[Answer]) -> Answer:
    """A service's answer.

    Raises:
        Failure: it refused, nobody serves the subject, or the answer cannot be read.
    """
    try:
        data = await bus.request(subject, encode(message), timeout_s=ANSWER_S)
        answer = decode(data, Message)
    except TransientError as error:
        raise Failure(str(error)) from error
    except MalformedMessage as error:
        raise Failure(f"an answer that cannot be read (another version?): {error}") from error
    if isinstance(answer, Refused):
        raise Failure(answer.reason)
    if not isinstance(answer, expected):
        raise Failure(f"a {type(answer).__name__} for an answer to {type(message).__name__}")
    return answer


def shown(server: str) -> str:
    """A server's address without user and password."""
    parts = urlsplit(server)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
