"""`python -m services.aggregator`: load the settings, connect, serve."""

import sys

from services.aggregator.config import Settings
from services.aggregator.service import Aggregator
from shared import nats_bus
from shared.clock import SystemClock
from shared.runtime import Stop
from shared.service import main


async def serve(settings: Settings, stop: Stop) -> None:
    bus = await nats_bus.connect(
        list(settings.servers), name="aggregator", credentials=settings.credentials
    )
    try:
        await Aggregator(bus, bus, settings, SystemClock()).serve(stop)
    finally:
        await bus.close()


if __name__ == "__main__":
    sys.exit(main(Settings, "aggregator", serve))
