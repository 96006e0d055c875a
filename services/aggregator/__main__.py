"""`python -m services.aggregator`: load the settings, connect, serve."""

import sys

from services.aggregator.config import Settings
from services.aggregator.service import Aggregator
from shared import config, logs, nats_bus
from shared.clock import SystemClock
from shared.errors import ConfigError
from shared.runtime import EXIT_CONFIG, Stop, run


def main() -> int:
    try:
        settings = config.load(
            Settings,
            program="seedwire-aggregator",
            prefix="SEEDWIRE_AGGREGATOR",
            argv=sys.argv[1:],
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return EXIT_CONFIG
    logs.configure("aggregator", level=settings.log_level)
    logs.get("aggregator").info("settings", **config.shown(settings))

    async def serve(stop: Stop) -> None:
        bus = await nats_bus.connect(list(settings.servers), name="aggregator")
        try:
            await Aggregator(bus, bus, settings, SystemClock()).serve(stop)
        finally:
            await bus.close()

    return run(serve)


if __name__ == "__main__":
    sys.exit(main())
