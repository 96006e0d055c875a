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

import msgspec

from shared.errors import ConfigError
from shared.identity import claims, files, roles
from shared.identity.access import TLS_NAME
from shared.identity.keys import Key, Kind, make
from shared.identity.roles import RIGHTS, SERVICES, Role

ACCOUNT, SYSTEM = "SEEDWIRE", "SYS"
SYSTEM_USER = "system"
BEFORE_ALL = 1
"""When the account's token in server.conf was issued: older than any that a registrar issues, so
that nats-server, which keeps the newest, forgets no revocation when it starts again."""


class RegistrarKeys(msgspec.Struct, frozen=True):
    """What enrolling and revoking take."""

    account: str
    operator_signing_seed: str
    device_seed: str
    signing_keys: dict[str, str]
    """Role -> the public key whose users it describes."""

    def account_token(self, revoked: Mapping[str, int], at: int) -> str:
        """The account as it stands, with today's roles."""
        signer = Key(self.operator_signing_seed)
        return account_token(self.account, self.signing_keys, signer, revoked=revoked, at=at)

    def device_token(self, device: str, public_key: str, at: int) -> str:
        """Lets the holder of a key in as `device`."""
        signer = Key(self.device_seed)
        return claims.scoped_user(device, public_key, signer, account=self.account, at=at)


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
        signers = {role: self._key(f"role-{role}") for role in RIGHTS}
        public = {role: signer.public for role, signer in signers.items()}
        for name, role in SERVICES.items():
            if not self.creds(name).exists():
                user = make("user")
                token = claims.scoped_user(
                    name, user.public, signers[role], account=account.public, at=at
                )
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
                account.public: account_token(account.public, public, signing, at=BEFORE_ALL),
            },
            joiner=claims.own_user(
                roles.JOINER, joiner.public, account, roles.JOINER_RIGHTS, at=BEFORE_ALL
            ),
            folder=seen_at or str(self.folder.resolve()),
            tls=tls,
        )
        files.write(self.server_conf, conf)
        keys = RegistrarKeys(account.public, signing.seed, signers["device"].seed, {**public})
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
        roles_known = registrar_keys(self.registrar_file).signing_keys
        base = {"operator-signing", "system", "account", "joiner"}
        return base | {f"role-{role}" for role in roles_known}

    def _creds(self, name: str, token: str, user: Key) -> None:
        files.write(self.creds(name), claims.creds_text(token, user.seed), mode=files.SECRET)


def account_token(
    account: str,
    signing_keys: Mapping[Role, str] | Mapping[str, str],
    signer: Key,
    *,
    at: int,
    revoked: Mapping[str, int] | None = None,
) -> str:
    """The fleet's account: one signing key a role."""
    scopes = [
        claims.scope(role, signing_keys[role], rights.permissions())
        for role, rights in RIGHTS.items()
        if role in signing_keys
    ]
    return claims.account(
        ACCOUNT, account, signer, at=at, scopes=scopes, revoked=revoked, streams=True
    )


def registrar_keys(path: Path) -> RegistrarKeys:
    """
    Raises:
        ConfigError: the file is missing or damaged; names it.
    """
    try:
        return msgspec.json.decode(files.read(path), type=RegistrarKeys)
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
