"""A fleet's keys, made once: operator, accounts, signing keys, credentials, certificate.

DIR/keys/*.seed          secrets; operator.seed is the root and may be moved to a safe
DIR/registrar.json       the secrets that the registrar needs to enrol and revoke
DIR/creds/NAME.creds     what each service logs in with; system.creds is the registrar's second
DIR/tls/cert.pem         the broker's certificate, which is what clients trust: their ca_file
DIR/tls/key.pem          its private key
DIR/server.conf          for nats-server, by `include` or as it is
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from shared.errors import ConfigError
from shared.identity import claims, files, roles
from shared.identity.access import TLS_NAME
from shared.identity.keys import Key, Kind, make
from shared.identity.roles import RIGHTS, SERVICES, Role

FLEET, GUESTS, SYSTEM = "SEEDWIRE", "GUESTS", "SYS"
"""Accounts: of services and operators, with the streams; of devices and strangers; the broker's."""
SYSTEM_USER = "system"
BEFORE_ALL = 1
"""When the accounts' tokens in server.conf were issued: older than any that a registrar issues, so
that nats-server, which keeps the newest, forgets no revocation when it starts again."""


T = TypeVar("T")


class RegistrarKeys(msgspec.Struct, frozen=True):
    """What enrolling and revoking take."""

    account: str
    guests: str
    operator_signing_seed: str
    device_seed: str
    signing_keys: dict[str, str]
    """Role -> the public key whose users it describes."""

    def account_tokens(self, revoked: Mapping[str, int], at: int) -> tuple[str, str]:
        """The fleet's account and its guests', with today's roles; `revoked` are guests."""
        signer = Key(self.operator_signing_seed)
        return (
            fleet_token(self.account, self.signing_keys, signer, at=at),
            guests_token(
                self.guests, self.account, self.signing_keys, signer, at=at, revoked=revoked
            ),
        )

    def device_token(self, device: str, public_key: str, at: int) -> str:
        """Lets the holder of a key in as `device`."""
        signer = Key(self.device_seed)
        tags = [claims.RESERVED_EARS]
        return claims.scoped_user(device, public_key, signer, account=self.guests, at=at, tags=tags)


@dataclass(frozen=True, slots=True)
class Authority:
    """The files of one fleet."""

    folder: Path

    @property
    def registrar_file(self) -> Path:
        return self.folder / "registrar.json"

    @property
    def ca_file(self) -> Path:
        return self.folder / "tls" / "cert.pem"

    @property
    def server_conf(self) -> Path:
        return self.folder / "server.conf"

    def creds(self, name: str) -> Path:
        return self.folder / "creds" / f"{name}.creds"

    @property
    def system_creds(self) -> Path:
        return self.creds(SYSTEM_USER)

    def make(self, *, hosts: Iterable[str] = (), tls: bool = True, seen_at: str = "") -> bool:
        """Everything is there; what was there already has stayed. Whether anything was made.

        `hosts`: what else the certificate is made out to. `seen_at`: the folder's path where
        nats-server runs, if that is another.

        Raises:
            ConfigError: the folder cannot be written, or holds only half of what it should.
        """
        fresh = not self.registrar_file.exists()
        now = datetime.now(UTC)
        at = int(now.timestamp())
        signing = self._key("operator-signing", "operator")
        system, account = self._key("system"), self._key("account")
        guests = self._key("guests")
        signers = {role: self._key(f"role-{role}") for role in RIGHTS}
        public = {role: signer.public for role, signer in signers.items()}
        for name, role in SERVICES.items():
            home = (guests if role in roles.GUESTS else account).public
            if self._home_of(name) != home:
                user = make("user")
                token = claims.scoped_user(name, user.public, signers[role], account=home, at=at)
                self._creds(name, token, user)
        if not self.system_creds.exists():
            user = make("user")
            rights = roles.SYSTEM_RIGHTS.permissions()
            token = claims.own_user(SYSTEM_USER, user.public, system, rights, at=at)
            self._creds(SYSTEM_USER, token, user)
        if tls and not self.ca_file.exists():
            from shared.identity import certificate  # only here: devices go without it

            pem, private = certificate.make(TLS_NAME, hosts, now)
            files.write(self.folder / "tls" / "key.pem", private, mode=files.SECRET)
            files.write(self.ca_file, pem)
        joiner = self._key("joiner", "user")
        conf = _server_conf(
            operator=self._operator_token(signing.public, system.public),
            system=system.public,
            tokens={
                system.public: claims.account(SYSTEM, system.public, signing, at=BEFORE_ALL),
                account.public: fleet_token(account.public, public, signing, at=BEFORE_ALL),
                guests.public: guests_token(
                    guests.public, account.public, public, signing, at=BEFORE_ALL
                ),
            },
            joiner=claims.own_user(
                roles.JOINER, joiner.public, guests, roles.JOINER_RIGHTS, at=BEFORE_ALL
            ),
            folder=seen_at or str(self.folder.resolve()),
            tls=tls,
        )
        files.write(self.server_conf, conf)
        keys = RegistrarKeys(
            account.public, guests.public, signing.seed, signers["device"].seed, {**public}
        )
        text = msgspec.json.format(msgspec.json.encode(keys), indent=2).decode()
        files.write(self.registrar_file, text + "\n", mode=files.SECRET)
        return fresh

    def _operator_token(self, signing: str, system: str) -> str:
        """Made once: from then on the root key may lie in a safe."""
        path = self.folder / "operator.jwt"
        if not path.exists():
            root = self._key("operator", "operator")
            token = claims.operator(
                "seedwire", root, signing=[signing], system=system, at=BEFORE_ALL
            )
            files.write(path, token + "\n")
        return files.read(path).strip()

    def _key(self, name: str, kind: Kind = "account") -> Key:
        """The key of that name, made if there has never been one."""
        path = self.folder / "keys" / f"{name}.seed"
        if not path.exists():
            if name in self._known():
                raise ConfigError(
                    f"{path} is missing: put it back; a new one would not fit the others in "
                    f"{self.folder}"
                )
            files.write(path, make(kind).seed + "\n", mode=files.SECRET)
        return Key(files.read(path))

    def _known(self) -> set[str]:
        """Names of the keys that a finished `make` has used."""
        if not self.registrar_file.exists():
            return set()
        known = _decoded(self.registrar_file, _Known)
        base = {"operator-signing", "system", "account", "joiner"}
        if known.guests:
            base.add("guests")
        return base | {f"role-{role}" for role in known.signing_keys}

    def _home_of(self, name: str) -> str:
        """The account that a service's credentials are of; empty if it has none."""
        path = self.creds(name)
        if not path.exists():
            return ""
        try:
            return claims.decode_unverified(
                claims.token_of(files.read(path), str(path))
            ).nats.issuer_account
        except ValueError as error:
            raise ConfigError(f"{path}: {error}; remove it, and it is made anew") from error

    def _creds(self, name: str, token: str, user: Key) -> None:
        files.write(self.creds(name), claims.creds_text(token, user.seed), mode=files.SECRET)


SigningKeys = Mapping[Role, str] | Mapping[str, str]


def fleet_token(account: str, signing_keys: SigningKeys, signer: Key, *, at: int) -> str:
    """The account of services and operators: it has the streams, and one signing key a role."""
    scopes = _scopes(signing_keys, guests=False)
    return claims.account(
        FLEET, account, signer, at=at, scopes=scopes, streams=True, exports=roles.EXPORTS
    )


def guests_token(
    guests: str,
    account: str,
    signing_keys: SigningKeys,
    signer: Key,
    *,
    at: int,
    revoked: Mapping[str, int] | None = None,
) -> str:
    """The account of devices and strangers: it has nothing but what the fleet's gives it."""
    scopes = _scopes(signing_keys, guests=True)
    return claims.account(
        GUESTS,
        guests,
        signer,
        at=at,
        scopes=scopes,
        revoked=revoked,
        imports=roles.imports(account),
    )


def _scopes(signing_keys: SigningKeys, *, guests: bool) -> list[dict[str, object]]:
    return [
        claims.scope(role, signing_keys[role], rights.permissions())
        for role, rights in RIGHTS.items()
        if role in signing_keys and (role in roles.GUESTS) is guests
    ]


class _Known(msgspec.Struct, frozen=True):
    """What every registrar.json ever made has; `guests` since devices have their own account."""

    signing_keys: dict[str, str]
    guests: str = ""


def registrar_keys(path: Path) -> RegistrarKeys:
    """
    Raises:
        ConfigError: the file is missing or damaged; names it.
    """
    return _decoded(path, RegistrarKeys)


def _decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(files.read(path), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; make it by `seedwire keys init`") from error


def _server_conf(
    *,
    operator: str,
    system: str,
    tokens: Mapping[str, str],
    joiner: str,
    folder: str,
    tls: bool,
) -> str:
    preload = "\n".join(f'  {account}: "{token}"' for account, token in tokens.items())
    text = f"""\
# Made by `seedwire keys init`. Tokens are no secrets; the files in tls/ and the seeds are.
operator: "{operator}"
system_account: {system}
resolver {{
  type: full
  dir: "{folder}/accounts"
  allow_delete: false
  interval: "2m"
}}
resolver_preload {{
{preload}
}}
# Whoever brings no credentials may do one thing: ask to be enrolled.
default_sentinel: "{joiner}"
"""
    if tls:
        text += f"""\
tls {{
  cert_file: "{folder}/tls/cert.pem"
  key_file: "{folder}/tls/key.pem"
  timeout: 5
}}
"""
    return text
