"""What each service's `__main__` does: load the settings, set up the log, serve, exit by code."""

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from shared import config, logs
from shared.errors import ConfigError
from shared.runtime import EXIT_CONFIG, Stop, run


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
