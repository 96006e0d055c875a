"""Refused connections, told once and then summed up: whoever knocks all day fills no log."""

from dataclasses import dataclass

import msgspec

from shared.errors import MalformedMessage
from shared.identity.claims import Claims, decode_unverified
from shared.messages import ConnectionRefused

EVERY_S = 60.0
"""Attempts that are alike are told of at once, and then summed up this often."""
MAX_KINDS = 256
"""How many different ones are told apart."""


class Client(msgspec.Struct, frozen=True):
    host: str = ""
    name: str = ""
    jwt: str = ""


class Event(msgspec.Struct, frozen=True):
    """What nats-server says of a connection that it refused."""

    client: Client = Client()
    reason: str = ""


def read(data: bytes) -> tuple[Client, Claims | None]:
    """Who it was, and what its token said; none if it had none.

    Raises:
        MalformedMessage: not such an event.
    """
    try:
        client = msgspec.json.decode(data, type=Event).client
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"not an event of nats-server: {error}") from error
    try:
        return client, decode_unverified(client.jwt) if client.jwt else None
    except ValueError:
        return client, None


def plain(text: str, size: int = 100) -> str:
    """A stranger's words, fit to be shown."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:size])


@dataclass(slots=True)
class _Seen:
    told_at: float
    message: ConnectionRefused
    untold: int = 0


class Refusals:
    """Decides which attempts are told of, and when; `now` never goes back."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, str, str], _Seen] = {}

    def take(self, message: ConnectionRefused, now: float) -> ConnectionRefused | None:
        """The attempt, if it should be told of now."""
        key = (message.public_key, message.name, message.host, message.reason)
        if key not in self._seen and len(self._seen) >= MAX_KINDS:
            key = ("", "", "", "")
            message = ConnectionRefused(reason="many different strangers")
        seen = self._seen.get(key)
        if seen is None:
            self._seen[key] = _Seen(now, message)
            return message
        seen.untold += 1
        return None

    def due(self, now: float) -> list[ConnectionRefused]:
        """Sums of what came since it was told of last; who has been quiet is forgotten."""
        found: list[ConnectionRefused] = []
        for key, seen in list(self._seen.items()):
            if now - seen.told_at < EVERY_S:
                continue
            if not seen.untold:
                del self._seen[key]
                continue
            found.append(msgspec.structs.replace(seen.message, count=seen.untold))
            seen.told_at, seen.untold = now, 0
        return found
