"""A broker that knows identities, on a real nats-server with TLS, and ways to come to it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.demo.processes import Child
from services.console.inviting import ticket
from shared import nats_bus, subjects
from shared.broker import BrokerProcess, start_broker
from shared.codec import decode, encode
from shared.credentials import Credentials
from shared.errors import TransientError
from shared.identity import claims
from shared.identity.access import TLS_NAME, Access
from shared.identity.authority import Authority, registrar_keys
from shared.identity.keys import make
from shared.messages import DevicesInvited, InviteDevices, Message


@dataclass
class Secured:
    """A fleet's broker and keys below `folder`; the registrar runs where a test starts it."""

    folder: Path
    broker: BrokerProcess
    authority: Authority
    registrar: Child | None = None

    @property
    def access(self) -> Access:
        creds, ca = self.authority.creds("console"), self.authority.ca_file
        return Access([self.broker.url], str(creds), str(ca), TLS_NAME)

    def trusting(self, creds_file: Path | str = "", **more: str) -> Credentials:
        """Credentials of somebody who trusts the broker's certificate."""
        ca = str(self.authority.ca_file)
        return Credentials(creds_file=str(creds_file), ca_file=ca, tls_name=TLS_NAME, **more)

    async def connect(self, creds: Path | str, *, patience_s: float = 10.0) -> nats_bus.NatsBus:
        return await nats_bus.connect(
            [self.broker.url],
            name="test",
            credentials=self.trusting(creds),
            patience_s=patience_s,
        )

    def device_creds(self, name: str) -> Path:
        """A device's credentials, made without a registrar."""
        keys, key = registrar_keys(self.authority.registrar_file), make("user")
        token = keys.device_token(name, key.public, int(time.time()))
        path = self.folder / f"{name}.creds"
        path.write_text(claims.creds_text(token, key.seed))
        return path

    async def start_registrar(self) -> Child:
        arguments = ["--servers", self.broker.url, "--tls-name", TLS_NAME]
        arguments += ["--ca-file", str(self.authority.ca_file)]
        arguments += ["--creds-file", str(self.authority.creds("registrar"))]
        arguments += ["--system-creds-file", str(self.authority.system_creds)]
        arguments += ["--registrar-file", str(self.authority.registrar_file)]
        arguments += ["--state-dir", str(self.folder / "registrar")]
        log = self.folder / "registrar.log"
        self.registrar = Child("registrar", "services.registrar", arguments, log)
        await self.registrar.start()
        return self.registrar

    async def ask(self, bus: nats_bus.NatsBus, subject: str, message: Message) -> Message:
        """A service's answer, waited for while it starts."""
        async with asyncio.timeout(20):
            while True:
                try:
                    return decode(await bus.request(subject, encode(message), timeout_s=5), Message)
                except TransientError:
                    await asyncio.sleep(0.05)

    async def ticket(self, bus: nats_bus.NatsBus, request: InviteDevices) -> str:
        answer = await self.ask(bus, subjects.IDENTITY_INVITE, request)
        assert isinstance(answer, DevicesInvited), answer
        return ticket(self.access, answer.secret, request.device or "").text()


@asynccontextmanager
async def secured(
    folder: Path, made: Callable[[Authority], object] = lambda authority: authority.make()
) -> AsyncGenerator[Secured, None]:
    """A secured broker; what a test has started ends with the block."""
    authority = Authority(folder / "keys")
    made(authority)
    security = authority.server_conf.read_text()
    async with start_broker(folder / "nats", security=security) as broker:
        fleet = Secured(folder, broker, authority)
        try:
            yield fleet
        finally:
            if fleet.registrar is not None and fleet.registrar.running:
                await fleet.registrar.stop()
