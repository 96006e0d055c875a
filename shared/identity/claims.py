"""JSON Web Tokens as nats-server reads them (NATS JWT version 2): an operator vouches for accounts,
an account's keys for users. Everything is a pure function of its arguments.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from shared.errors import ConfigError

MADE_HERE = "seedwire"
"""The tag of tokens made here: their bearer's inbox carries its name."""
RESERVED_EARS = "reserved-ears"
"""The tag of those whose bearer hears the fleet under names that no answer can be sent to."""

UNLIMITED = -1

_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
_BEGIN, _END = "-----BEGIN NATS USER JWT-----", "------END NATS USER JWT------"


class Signer(Protocol):
    """What signs: `keys.Key`."""

    public: str

    def sign(self, data: bytes) -> bytes: ...


class Details(msgspec.Struct, frozen=True):
    issuer_account: str = ""
    tags: list[str] = []
    type: str = ""


class Claims(msgspec.Struct, frozen=True):
    """What a token says; nobody has verified it."""

    sub: str = ""
    iss: str = ""
    name: str = ""
    iat: float = 0
    exp: float = 0
    nats: Details = Details()


def encode(claims: Mapping[str, object], signer: Signer) -> str:
    """The signed token."""
    signed = {**claims, "iss": signer.public}
    digest = hashlib.new("sha512_256", _json(signed)).digest()
    signed["jti"] = base64.b32encode(digest).decode().rstrip("=")
    body = f"{_text(_json(_HEADER))}.{_text(_json(signed))}"
    return f"{body}.{_text(signer.sign(body.encode()))}"


def decode_unverified(token: str) -> Claims:
    """What `token` says of itself.

    Raises:
        ValueError: it is no token.
    """
    parts = token.strip().split(".")
    if len(parts) != 3:
        raise ValueError("this is no token: one has three parts")
    try:
        body = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        return msgspec.json.decode(body, type=Claims)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ValueError(f"this is no token: {error}") from error


def operator(name: str, key: Signer, *, signing: Sequence[str], system: str, at: int) -> str:
    """An operator whose `signing` keys may vouch too; `system` is its system account."""
    nats = {"signing_keys": list(signing), "system_account": system, "type": "operator"}
    return encode(_claims(name, key.public, at, nats), key)


def account(
    name: str,
    public: str,
    signer: Signer,
    *,
    at: int,
    scopes: Sequence[Mapping[str, object]] = (),
    revoked: Mapping[str, int] | None = None,
    streams: bool = False,
    exports: Sequence[Mapping[str, object]] = (),
    imports: Sequence[Mapping[str, object]] = (),
) -> str:
    """An account without limits, whose `scopes` say what each of its signing keys' users may do.

    `revoked`: by a user's public key, the time up to which its tokens are worth nothing.
    `exports` to every account of the operator, of which a fleet has no others than those made here.
    """
    limits: dict[str, object] = {
        **_limits(),
        **dict.fromkeys(("imports", "exports", "conn", "leaf"), UNLIMITED),
        "wildcards": True,
    }
    if streams:
        stores = ("mem_storage", "disk_storage", "streams", "consumer")
        limits |= dict.fromkeys(stores, UNLIMITED)
    nats: dict[str, object] = {"limits": limits, "type": "account"}
    if scopes:
        nats["signing_keys"] = list(scopes)
    if revoked:
        nats["revocations"] = dict(revoked)
    if exports:
        nats["exports"] = list(exports)
    if imports:
        nats["imports"] = list(imports)
    return encode(_claims(name, public, at, nats), signer)


def scoped_user(
    name: str, public: str, signer: Signer, *, account: str, at: int, tags: Sequence[str] = ()
) -> str:
    """A user that may do what the scope of the signing key says, and nothing of its own."""
    nats = {"issuer_account": account, "tags": [MADE_HERE, *tags], "type": "user"}
    return encode(_claims(name, public, at, nats), signer)


def own_user(
    name: str, public: str, account_key: Signer, permissions: Mapping[str, object], *, at: int
) -> str:
    """A user whose token itself says what it may do."""
    nats = {**_limits(), **permissions, "tags": [MADE_HERE], "type": "user"}
    return encode(_claims(name, public, at, nats), account_key)


def scope(role: str, public: str, permissions: Mapping[str, object]) -> dict[str, object]:
    """What users signed by the key `public` may do."""
    template = {**_limits(), **permissions}
    return {"kind": "user_scope", "key": public, "role": role, "template": template}


def told(subject: str) -> dict[str, object]:
    """An export: whoever imports it hears what is published on `subject`."""
    return {"name": subject, "subject": subject, "type": "stream"}


def served(
    subject: str, *, answers: Literal["Singleton", "Stream"], within_s: int
) -> dict[str, object]:
    """An export: whoever imports it may ask on `subject`, and gets the answers that come in time.

    The time runs from the question, or from the last answer.
    """
    return {
        "name": subject,
        "subject": subject,
        "type": "service",
        "response_type": answers,
        "response_threshold": within_s * 1_000_000_000,
    }


def imported(export: Mapping[str, object], account: str, local: str = "") -> dict[str, object]:
    """The import of an export of `account`, under the same subject if `local` names no other."""
    found = {key: export[key] for key in ("name", "subject", "type")} | {"account": account}
    return {**found, "local_subject": local} if local else found


def creds_text(token: str, seed: str) -> str:
    """A credentials file as every NATS client reads it."""
    return (
        f"{_BEGIN}\n{token}\n{_END}\n\n"
        "The seed below is a secret: whoever has it is this user.\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )


def token_of(creds: str, path: str) -> str:
    """The token in the text of a credentials file.

    Raises:
        ConfigError: there is none; names `path`.
    """
    _, begin, rest = creds.partition(_BEGIN)
    token, end, _ = rest.partition(_END)
    if not (begin and end):
        raise ConfigError(f"{path} is no NATS credentials file: it has no {_BEGIN}")
    return token.strip()


def _claims(name: str, public: str, at: int, nats: Mapping[str, object]) -> dict[str, object]:
    return {"name": name, "sub": public, "iat": at, "nats": {**nats, "version": 2}}


def _limits() -> dict[str, object]:
    return {"subs": UNLIMITED, "data": UNLIMITED, "payload": UNLIMITED}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
