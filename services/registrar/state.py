"""Who is invited, enrolled and revoked: decided from facts; no I/O, clock or randomness.

Times are seconds since 1970. An invitation is known by the hash of its secret.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from shared.errors import RejectError
from shared.identity.claims import Claims
from shared.messages import Enroll, Identity, InviteDevices, RevokeDevice
from shared.messages.identity import MAX_LISTED

MAX_OPEN = 1000
"""Invitations that may be open at once."""


class Invited(msgspec.Struct, frozen=True, tag=True):
    invitation: str
    uses: int
    expires_at: float
    device: str | None


class Admitted(msgspec.Struct, frozen=True, tag=True):
    device: str
    public_key: str
    invitation: str
    at: int


class Revoked(msgspec.Struct, frozen=True, tag=True):
    device: str
    public_key: str
    at: int


class AccountIssued(msgspec.Struct, frozen=True, tag=True):
    """A token of the account was issued; the broker keeps the newest, so no later one is older."""

    at: int


Fact = Invited | Admitted | Revoked | AccountIssued


@dataclass(frozen=True, slots=True)
class Accounts:
    """Public keys of this fleet's accounts."""

    fleet: str
    guests: str


@dataclass(slots=True)
class Invitation:
    uses: int
    expires_at: float
    device: str | None
    used: int = 0
    closed: bool = False

    def open(self, now: float) -> bool:
        return (
            not self.closed and now < self.expires_at and (not self.uses or self.used < self.uses)
        )


@dataclass(slots=True)
class Known:
    """An identity that was given out."""

    device: str
    public_key: str
    invitation: str
    at: int
    revoked_at: int = 0


def hashed(secret: str) -> str:
    """What is kept of an invitation's secret. Found by its hash, it needs no patient compare."""
    return hashlib.sha256(secret.encode()).hexdigest()


class State:
    """Everything the journal says."""

    def __init__(self) -> None:
        self.invitations: dict[str, Invitation] = {}
        self.devices: dict[str, Known] = {}
        """By name, the latest identity."""
        self.keys: dict[str, Known] = {}
        """By public key, every identity there ever was."""
        self.refused: dict[str, int] = {}
        """By public key of those, how often the broker refused it."""
        self.account_issued_at = 0

    # ---- what is asked

    def decide_invite(self, request: InviteDevices, invitation: str, now: float) -> Invited:
        """
        Raises:
            RejectError: too many invitations are open.
        """
        if sum(one.open(now) for one in self.invitations.values()) >= MAX_OPEN:
            raise RejectError(f"{MAX_OPEN} invitations are open: let some expire")
        if request.device is not None and request.uses != 1:
            raise RejectError("an invitation for one device by name is good for one use")
        return Invited(invitation, request.uses, now + request.expires_s, request.device)

    def decide_enroll(self, request: Enroll, now: float) -> Admitted | None:
        """The fact that admits it; none if it was admitted before, by the same key.

        Raises:
            RejectError: the invitation or the name is not to be had; the text says why.
        """
        invitation = hashed(request.secret)
        found = self.invitations.get(invitation)
        if found is None:
            raise RejectError("this ticket is unknown here: is it of another fleet?")
        holder = self.keys.get(request.public_key)
        if holder is not None:
            if holder.revoked_at:
                raise RejectError("this key was revoked: enrol with a new ticket")
            if holder.device == request.device and holder.invitation == invitation:
                return None
            raise RejectError(f"this key is enrolled as {holder.device} already")
        if found.closed:
            raise RejectError("this ticket is closed: a device that came by it was revoked")
        if now >= found.expires_at:
            raise RejectError("this ticket has expired: ask for a new one")
        if found.uses and found.used >= found.uses:
            raise RejectError("this ticket is used up: ask for a new one")
        if found.device not in (None, request.device):
            raise RejectError(f"this ticket is for the device {found.device} alone")
        namesake = self.devices.get(request.device)
        if namesake is not None and not namesake.revoked_at:
            raise RejectError(
                f"the name {request.device} is taken by another key: choose another --device, or "
                f"have an operator run `seedwire device revoke {request.device}` first"
            )
        return Admitted(request.device, request.public_key, invitation, int(now))

    def decide_revoke(self, request: RevokeDevice, now: float) -> Revoked | None:
        """The fact that revokes it; none if it is revoked already.

        Raises:
            RejectError: there is no such device.
        """
        known = self.devices.get(request.device)
        if known is None:
            raise RejectError(f"no device {request.device} is enrolled; see `seedwire device list`")
        if known.revoked_at:
            return None
        return Revoked(known.device, known.public_key, max(int(now), known.at))

    def decide_issue(self, now: float) -> AccountIssued:
        """When the next token of the account is issued: later than any before."""
        return AccountIssued(max(int(now), self.account_issued_at + 1))

    # ---- what is so

    def evolve(self, fact: Fact) -> None:
        match fact:
            case Invited():
                self.invitations[fact.invitation] = Invitation(
                    fact.uses, fact.expires_at, fact.device
                )
            case Admitted():
                known = Known(fact.device, fact.public_key, fact.invitation, fact.at)
                self.devices[fact.device] = self.keys[fact.public_key] = known
                if fact.invitation in self.invitations:
                    self.invitations[fact.invitation].used += 1
            case Revoked():
                if (revoked := self.keys.get(fact.public_key)) is not None:
                    revoked.revoked_at = fact.at
                    if revoked.invitation in self.invitations:
                        self.invitations[revoked.invitation].closed = True
            case AccountIssued():
                self.account_issued_at = fact.at

    def revocations(self) -> Mapping[str, int]:
        """By public key, up to when its tokens are worth nothing: what the account's token says."""
        return {key: known.revoked_at for key, known in self.keys.items() if known.revoked_at}

    def listed(self) -> list[Identity]:
        """The identities, one a name, by name; the newest if there are too many."""
        newest = sorted(self.devices.values(), key=lambda one: -max(one.at, one.revoked_at))
        return [
            Identity(
                device=one.device,
                public_key=one.public_key,
                state="revoked" if one.revoked_at else "enrolled",
                enrolled_at=float(one.at),
                revoked_at=float(one.revoked_at),
                refused=self.refused.get(one.public_key, 0),
            )
            for one in sorted(newest[:MAX_LISTED], key=lambda one: one.device)
        ]

    def open_invitations(self, now: float) -> int:
        return sum(one.open(now) for one in self.invitations.values())

    # ---- who was refused

    def count_refused(self, public_key: str) -> str:
        """Count it where the key is one of ours; the device it belongs or belonged to, or ''."""
        known = self.keys.get(public_key)
        if known is None:
            return ""
        self.refused[public_key] = self.refused.get(public_key, 0) + 1
        return known.device

    def why_refused(self, claims: Claims | None, accounts: Accounts, now: float) -> str:
        """Why the broker will have refused a connection with these claims."""
        if claims is None:
            return "no identity"
        known = self.keys.get(claims.sub)
        if known is not None and known.revoked_at:
            return "revoked"
        account = claims.nats.issuer_account or claims.iss
        if account == accounts.fleet and known is not None:
            return "an identity from before devices had an account of their own: enrol it anew"
        if account not in (accounts.fleet, accounts.guests):
            return "an identity of another fleet"
        if claims.exp and claims.exp <= now:
            return "an identity that has expired"
        if known is None:
            return "an identity that was never given out"
        return "the identity of a device, without its key"
