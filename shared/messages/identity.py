"""Operator, device and registrar: invitations, enrolment, revocation, and who was refused."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.messages.base import Count, Message, Name, Record, Seconds, Text

PublicKey = Annotated[str, Meta(pattern=r"^U[A-Z2-7]{55}$")]
"""A device's nkey, the public half."""

Secret = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{22}$")]
"""128 bits of an invitation, base64url."""

Token = Annotated[str, Meta(max_length=4000)]
"""A JWT. It proves nothing without the key it names."""

Time = Annotated[float, Meta(ge=0.0, le=1e12)]
"""Seconds since 1970."""

MAX_LISTED = 2000
"""What fits one answer."""

MAX_USES = 2**31


class InviteDevices(Message, frozen=True):
    """Make an invitation for `uses` devices within `expires_s`; for `device` alone if it is named.

    `uses` 0: any number.
    """

    uses: Annotated[int, Meta(ge=0, le=MAX_USES)] = 1
    expires_s: Annotated[float, Meta(ge=1.0, le=366 * 86400.0)] = 86400.0
    device: Name | None = None


class DevicesInvited(Message, frozen=True):
    """The invitation's secret, told once: the registrar keeps a hash."""

    secret: Secret
    expires_s: Seconds


class Enroll(Message, frozen=True):
    """A device asks to be known as `device` by its key. The same key again: the same answer."""

    device: Name
    public_key: PublicKey
    secret: Secret


class Enrolled(Message, frozen=True):
    """The device may come in with `jwt` and the seed of its key."""

    device: Name
    jwt: Token


class RevokeDevice(Message, frozen=True):
    """Put a device out, now and for good; its invitation is closed with it."""

    device: Name


class DeviceRevoked(Message, frozen=True):
    """The broker refuses the device's key."""

    device: Name
    public_key: PublicKey


class ListIdentities(Message, frozen=True):
    """Which devices are known by a key?"""


class Identity(Record, frozen=True):
    """A device and its key."""

    device: Name
    public_key: PublicKey
    state: Literal["enrolled", "revoked"]
    enrolled_at: Time
    revoked_at: Time = 0.0
    refused: Count = 0
    """Connections of this key that the broker refused, since the registrar started."""


class IdentitiesListed(Message, frozen=True):
    """The newest identities, and how many invitations are open."""

    identities: Annotated[list[Identity], Meta(max_length=MAX_LISTED)]
    open_invitations: Count = 0


class ConnectionRefused(Message, frozen=True):
    """The broker did not let somebody in, or the registrar did not enrol them.

    What the stranger says of itself (`name`) is not proven; `device` is the enrolled device that
    `public_key` belongs or belonged to, empty for a foreign one. `count` attempts were alike.
    """

    reason: Text
    name: Annotated[str, Meta(max_length=200)] = ""
    host: Annotated[str, Meta(max_length=200)] = ""
    public_key: Annotated[str, Meta(max_length=200)] = ""
    device: Name | None = None
    count: Count = 1
