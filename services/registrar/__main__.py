"""`python -m services.registrar`: load the settings, connect twice, serve."""

import sys
from contextlib import closing
from pathlib import Path

from services.registrar.config import Settings, checked
from services.registrar.journal import Journal
from services.registrar.service import Registrar
from shared import nats_bus
from shared.clock import SystemClock
from shared.credentials import Credentials
from shared.identity.authority import registrar_keys
from shared.runtime import Stop
from shared.service import main


async def serve(settings: Settings, stop: Stop) -> None:
    keys = registrar_keys(Path(checked(settings).registrar_file))
    servers = list(settings.servers)
    system_credentials = Credentials(
        creds_file=settings.system_creds_file,
        ca_file=settings.ca_file,
        tls_name=settings.tls_name,
    )
    with closing(Journal(Path(settings.state_dir))) as journal:
        bus = await nats_bus.connect(servers, name="registrar", credentials=settings.credentials)
        try:
            system = await nats_bus.connect(
                servers, name="registrar (system)", credentials=system_credentials
            )
            try:
                await Registrar(bus, system, keys, journal, settings, SystemClock()).serve(stop)
            finally:
                await system.close()
        finally:
            await bus.close()


if __name__ == "__main__":
    sys.exit(main(Settings, "registrar", serve))
