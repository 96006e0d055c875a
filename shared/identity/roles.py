"""What each kind of identity may publish and subscribe to: the one place that says so.

An account's token carries these as templates of its signing keys, so that a device's own token
stays small and a change here holds for every device when the registrar starts next. nats-server
puts an identity's name where SELF stands.

Devices and strangers have an account of their own, which has of the fleet's what `imports` says.
nats-server answers wherever it is asked to, whatever the asker may publish; in that account there
is nothing to delete and no log to write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shared import subjects
from shared.identity import claims

Role = Literal["device", "service", "observer", "operator", "outsider"]

SELF = "{{name()}}"
DIRECT_GET = "$JS.API.DIRECT.GET"
STREAM_INFO = "$JS.API.STREAM.INFO.*"
OWN_INBOX = f"_INBOX_{SELF}.>"

JOINER = "joiner"
JOINER_INBOX = f"_INBOX_{JOINER}"


EARS = "_R_."
"""What a device hears begins so in the guests' account. nats-server answers whom it is told to,
but lets nobody name this word of its own: one device can send nothing into another's ears."""


def heard_as(subject: str) -> str:
    """Under which name a device hears what is published on a subject of ours."""
    return EARS + subject.removeprefix(f"{subjects.PREFIX}.")


def published_as(heard: str) -> str:
    """The subject that a device has heard under another name."""
    return f"{subjects.PREFIX}.{heard.removeprefix(EARS)}"


@dataclass(frozen=True, slots=True)
class Rights:
    """Subjects, as nats-server matches them; what is denied wins."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    never_publish: tuple[str, ...] = ()

    def permissions(self) -> dict[str, object]:
        """The same in the words of a token."""
        publish: dict[str, object] = {"allow": list(self.publish)}
        if self.never_publish:
            publish["deny"] = list(self.never_publish)
        return {"pub": publish, "sub": {"allow": list(self.subscribe)}}


def inbox_prefix(name: str) -> str:
    """Where answers to the identity `name` arrive."""
    return f"_INBOX_{name}"


def _direct_get(*streams: str) -> tuple[str, ...]:
    return tuple(f"{DIRECT_GET}.{stream}{end}" for stream in streams for end in ("", ".>"))


_OF_THE_BROKER = f"{subjects.PREFIX}.events.>"
"""Followers trust its sequence headers: only the broker publishes here."""

_OF_THE_FLEET = tuple(
    f"{subjects.PREFIX}.{kind}.>"
    for kind in (
        *("log", "detail", "update", "settled"),
        *("work", "wake", "report", "decision", "service"),
    )
)
"""What devices and services say to each other, and no operator."""

RIGHTS: Mapping[Role, Rights] = {
    "device": Rights(
        publish=(
            subjects.work(SELF),
            subjects.update("*", SELF),
            subjects.report(SELF),
            *_direct_get(subjects.LOG_STREAM, subjects.BLOBS_STREAM),
        ),
        subscribe=(
            heard_as(subjects.ALL_EVENTS),
            heard_as(subjects.wake(SELF)),
            heard_as(subjects.settled(SELF)),
            OWN_INBOX,
        ),
    ),
    "service": Rights(publish=(">",), subscribe=(">",), never_publish=(_OF_THE_BROKER,)),
    "observer": Rights(
        publish=(
            subjects.service(SELF),
            subjects.JOB_LIST,
            subjects.DEVICE_LIST,
            subjects.IDENTITY_LIST,
            f"{DIRECT_GET}.>",
            STREAM_INFO,
        ),
        subscribe=(f"{subjects.PREFIX}.>", OWN_INBOX),
    ),
    "operator": Rights(
        publish=(
            f"{subjects.PREFIX}.>",
            f"{DIRECT_GET}.>",
            STREAM_INFO,
            f"$JS.API.STREAM.PURGE.{subjects.BLOBS_STREAM}",
        ),
        subscribe=(f"{subjects.PREFIX}.>", OWN_INBOX),
        never_publish=(_OF_THE_BROKER, *_OF_THE_FLEET, subjects.ENROLL, subjects.REFUSED),
    ),
    "outsider": Rights(
        publish=_direct_get(subjects.LOG_STREAM, subjects.BLOBS_STREAM),
        # Any client's inbox is here: everybody else's answers arrive under another name.
        subscribe=(f"{subjects.PREFIX}.events.>", f"{subjects.PREFIX}.decision.>", "_INBOX.>"),
    ),
}

GUESTS: frozenset[Role] = frozenset({"device", "outsider"})
"""Who belongs to the account of devices and strangers."""

ANSWERED_WITHIN_S, READ_WITHIN_S, TAKEN_WITHIN_S = 10, 5, 1
"""How long nats-server remembers who asked, at some 1000 bytes each, so that a flood costs no more:
as long as anybody waits for an answer, for the next message that is read, and for none at all.
"""

SERVED: Sequence[Mapping[str, object]] = (
    *(
        claims.served(subject, answers="Singleton", within_s=ANSWERED_WITHIN_S)
        for subject in (subjects.ALL_WORK, subjects.ENROLL)
    ),
    *(
        claims.served(subject, answers="Singleton", within_s=TAKEN_WITHIN_S)
        for subject in (subjects.ALL_UPDATES, subjects.ALL_REPORTS)
    ),
    *(
        claims.served(subject, answers="Stream", within_s=READ_WITHIN_S)
        for subject in _direct_get(subjects.LOG_STREAM, subjects.BLOBS_STREAM)
    ),
)
"""What guests may ask of the fleet's account."""
OVERHEARD = (f"{subjects.PREFIX}.events.>", f"{subjects.PREFIX}.decision.>")
"""What strangers hear of it, under its own name: any client of theirs will do."""
HEARD = (subjects.ALL_EVENTS, subjects.wake("*"), subjects.ALL_SETTLED)
"""What devices hear of it."""
EXPORTS = (
    *SERVED,
    *(claims.told(subject) for subject in OVERHEARD),
    *(claims.told(subject) for subject in HEARD if subject != subjects.ALL_EVENTS),
)
"""nats-server takes none within another: OVERHEARD has the events."""


def imports(fleet: str) -> list[dict[str, object]]:
    """What the guests' account has of the fleet's: all that passes between them."""
    return [
        *(claims.imported(export, fleet) for export in SERVED),
        *(claims.imported(claims.told(subject), fleet) for subject in OVERHEARD),
        *(claims.imported(claims.told(subject), fleet, heard_as(subject)) for subject in HEARD),
    ]


JOINER_RIGHTS: Mapping[str, object] = {
    **Rights(publish=(subjects.ENROLL,), subscribe=(f"{JOINER_INBOX}.>",)).permissions(),
    "bearer_token": True,
    "subs": 8,
    "payload": 4096,
}
"""A connection without credentials. It is nobody in particular, so it needs no key."""

AUTH_ERRORS = "$SYS.SERVER.*.CLIENT.AUTH.ERR"
CLAIMS_UPDATE = "$SYS.REQ.CLAIMS.UPDATE"
SYSTEM_RIGHTS = Rights(
    publish=(CLAIMS_UPDATE,), subscribe=(AUTH_ERRORS, f"{inbox_prefix('system')}.>")
)
"""What the registrar may do in the system account."""

SERVICES: Mapping[str, Role] = {
    "aggregator": "service",
    "scheduler": "service",
    "registrar": "service",
    "telemetry": "observer",
    "proxy_inference": "observer",
    "console": "operator",
    "outsider": "outsider",
}
"""Who gets a credentials file from `seedwire keys init`."""
