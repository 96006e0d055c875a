"""The demo's keys: as in earnest, the broker lets in nobody without an identity, under TLS."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.console.inviting import invited
from shared import nats_bus
from shared.identity.access import TLS_NAME, Access
from shared.identity.authority import Authority
from shared.messages import InviteDevices

READY_S = 60.0


@dataclass(frozen=True)
class Identities:
    """Keys below `folder`, made when the demo begins."""

    folder: Path

    @property
    def authority(self) -> Authority:
        return Authority(self.folder)

    def make(self) -> str:
        """They are there; what nats-server must be told of them."""
        self.authority.make()
        return self.authority.server_conf.read_text(encoding="utf-8")

    def access(self, url: str) -> Access:
        """How an operator gets in at `url`."""
        creds, ca = self.authority.creds("console"), self.authority.ca_file
        return Access([url], str(creds.resolve()), str(ca.resolve()), TLS_NAME)

    def arguments(self, service: str) -> list[str]:
        """What a service is told."""
        found = ["--creds-file", str(self.authority.creds(service))]
        found += ["--ca-file", str(self.authority.ca_file), "--tls-name", TLS_NAME]
        if service == "registrar":
            found += ["--registrar-file", str(self.authority.registrar_file)]
            found += ["--system-creds-file", str(self.authority.system_creds)]
            found += ["--state-dir", str(self.folder.parent / "state" / "registrar")]
        return found

    async def ticket(self, url: str, devices: int) -> str:
        """What lets so many devices in, once the registrar runs."""
        fleet = self.access(url)
        bus = await nats_bus.connect(
            [url], name="demo", credentials=fleet.credentials(), patience_s=READY_S
        )
        try:
            return (await invited(bus, fleet, InviteDevices(uses=devices))).text()
        finally:
            await bus.close()

    def login(self) -> dict[str, Any]:
        """The same for a client of nats-py's own."""
        return {
            "user_credentials": str(self.authority.creds("console")),
            "inbox_prefix": "_INBOX_console",
            "tls": ssl.create_default_context(cafile=str(self.authority.ca_file)),
            "tls_hostname": TLS_NAME,
        }
