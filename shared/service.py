"""What services have in common: how each one starts, and how it tells telemetry its counters."""

import contextlib
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from shared import config, logs, subjects
from shared.bus import Bus
from shared.clock import Clock
from shared.codec import encode
from shared.credentials import Credentials
from shared.errors import ConfigError, TransientError
from shared.messages import ServiceReport
from shared.metrics import Counters
from shared.runtime import EXIT_CONFIG, Stop, project_version, run, settle

MAX_PROBLEM = 500
"""Letters of a report."""
REPEAT_S = 60.0
"""A report comes again after this without news too: whoever began to listen later hears it."""


class ServiceSettings(msgspec.Struct, frozen=True):
    """What every service can be told."""

    servers: Annotated[
        tuple[str, ...],
        Meta(
            description="Addresses of the broker, nats:// or tls://; more than one for a cluster."
        ),
    ] = ("nats://127.0.0.1:4222",)
    creds_file: Annotated[
        str, Meta(description="A NATS credentials file (.creds) to log in to the broker with.")
    ] = ""
    ca_file: Annotated[
        str,
        Meta(
            description="A PEM file of the authorities, or the one certificate, that the broker's "
            "certificate must come from; if not set, the system's."
        ),
    ] = ""
    tls_name: Annotated[
        str,
        Meta(
            description="What the broker's certificate must be made out to, if not its address; "
            "`seedwire` for one made by `seedwire keys init`."
        ),
    ] = ""
    log_level: Annotated[
        str, Meta(description="What is logged, on stderr: debug, info, warning or error.")
    ] = "info"

    @property
    def credentials(self) -> Credentials:
        """What this service logs in with."""
        return Credentials(creds_file=self.creds_file, ca_file=self.ca_file, tls_name=self.tls_name)


class StreamSettings(ServiceSettings, frozen=True):
    """What a service can be told that makes the broker's streams."""

    stream_replicas: Annotated[
        int,
        Meta(
            ge=1,
            le=5,
            description="Servers of the broker's cluster that keep each stream: 3 outlive the loss "
            "of one. A stream that has more keeps them.",
        ),
    ] = 1


Port = Annotated[
    int,
    Meta(ge=0, le=65535, description="Its HTTP port; 0 takes a free one, the log says which."),
]


class HttpSettings(ServiceSettings, frozen=True):
    """What a service can be told that has an HTTP port; each has a default port of its own."""

    host: Annotated[
        str, Meta(description="The address that its HTTP port listens on; 0.0.0.0 for all.")
    ] = "127.0.0.1"
    port: Port = 0


Settings = TypeVar("Settings", bound=ServiceSettings)


def main(
    kind: type[Settings], name: str, serve: Callable[[Settings, Stop], Awaitable[None]]
) -> int:
    """Run the service `name` until it is told to stop; the exit code."""
    prefix = f"SEEDWIRE_{name.upper()}"
    for sentence in config.misspelt(kind, prefix):
        print(f"warning: {sentence}", file=sys.stderr)  # noqa: T201 - as the error below
    try:
        settings = config.load(kind, program=f"seedwire-{name}", prefix=prefix, argv=sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return EXIT_CONFIG
    logs.configure(name, level=settings.log_level)
    logs.get(name).info("settings", **config.shown(settings))
    return run(lambda stop: serve(settings, stop))


def _put_traffic(counters: Counters, bus: Bus) -> None:
    """The counters say what has gone over the link by now."""
    traffic = bus.traffic
    counters.put("link_bytes_in", traffic.bytes_in)
    counters.put("link_bytes_out", traffic.bytes_out)


async def flushed(bus: Bus) -> None:
    """The broker has all that was published, if it is there; a stop does not fail without it."""
    with contextlib.suppress(TransientError):
        await bus.flush()


async def report_counters(
    bus: Bus,
    name: str,
    counters: Counters,
    clock: Clock,
    every_s: float,
    problem: Callable[[], str] = lambda: "",
) -> None:
    """Tell telemetry counters and problem of service `name` for ever.

    Whenever they have changed, and every REPEAT_S. Bytes over the link come with the others, and
    are no news alone: each report would call for the next.
    """
    started, sent, told, told_at = clock.now(), None, "", 0.0
    while True:
        counters.put("reconnects", bus.reconnects)
        counters.put("deliveries_dropped", bus.dropped)
        trouble = problem()[:MAX_PROBLEM]
        news = dict(counters.snapshot()) != sent or trouble != told
        if news or clock.now() - told_at >= REPEAT_S:
            _put_traffic(counters, bus)
            counts = sent = dict(counters.snapshot())
            told, told_at = trouble, clock.now()
            report = ServiceReport(
                service=name,
                version=project_version(),
                uptime_s=clock.now() - started,
                counters=counts,
                problem=trouble,
            )
            publishing = bus.publish(subjects.service(name), encode(report))
            await settle(publishing, counters, what="service_report")
        await clock.sleep(every_s)
