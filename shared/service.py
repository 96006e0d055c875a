"""What services have in common: how each one starts, and how it tells telemetry its counters."""

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from shared import config, logs, subjects
from shared.bus import Bus
from shared.clock import Clock
from shared.codec import encode
from shared.errors import ConfigError
from shared.messages import ServiceReport
from shared.metrics import Counters
from shared.runtime import EXIT_CONFIG, Stop, project_version, run, settle


class ServiceSettings(msgspec.Struct, frozen=True):
    """What every service can be told."""

    servers: Annotated[
        tuple[str, ...],
        Meta(
            description="Addresses of the broker, nats:// or tls://; more than one for a cluster."
        ),
    ] = ("nats://127.0.0.1:4222",)
    log_level: Annotated[
        str, Meta(description="What is logged, on stderr: debug, info, warning or error.")
    ] = "info"


Settings = TypeVar("Settings", bound=ServiceSettings)


def main(
    kind: type[Settings], name: str, serve: Callable[[Settings, Stop], Awaitable[None]]
) -> int:
    """Run the service `name` until it is told to stop; the exit code."""
    try:
        settings = config.load(
            kind,
            program=f"seedwire-{name}",
            prefix=f"SEEDWIRE_{name.upper()}",
            argv=sys.argv[1:],
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return EXIT_CONFIG
    logs.configure(name, level=settings.log_level)
    logs.get(name).info("settings", **config.shown(settings))
    return run(lambda stop: serve(settings, stop))


async def report_counters(
    bus: Bus, name: str, counters: Counters, clock: Clock, every_s: float
) -> None:
    """Tell telemetry the counters of service `name` whenever they have changed, for ever."""
    started, sent = clock.now(), None
    while True:
        counters.put("reconnects", bus.reconnects)
        counters.put("deliveries_dropped", bus.dropped)
        counts = dict(counters.snapshot())
        if counts != sent:
            sent = counts
            report = ServiceReport(
                service=name,
                version=project_version(),
                uptime_s=clock.now() - started,
                counters=counts,
            )
            publishing = bus.publish(subjects.service(name), encode(report))
            await settle(publishing, counters, what="service_report")
        await clock.sleep(every_s)
