"""`seedwire`: the operator's commands."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.console import blob_commands, job_commands, listing, options
from services.console.addresses import HOST
from services.console.failure import EXIT_CONFIG, EXIT_FAILURE, EXIT_USAGE, Usage, told
from services.console.job_commands import LOCAL, console, talk
from services.console.up import Plan, up
from shared import logs
from shared.errors import ConfigError, TransientError
from shared.nats_bus import NatsBus
from shared.runtime import Stop, project_version, run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a language model across devices that can only run it.",
)
app.add_typer(job_commands.commands, name="job")
app.add_typer(blob_commands.commands, name="blob")


@app.callback()
def configure(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(envvar="SEEDWIRE_LOG_LEVEL", help="What to log, on stderr."),
    ] = "error",
) -> None:
    """Set up what all commands share."""
    logs.configure("console", level=log_level)
    if version:
        console.print(project_version())
        raise typer.Exit


@app.command("up")
def up_command(
    state_dir: Annotated[
        Path, typer.Option(help="Where the broker's store, logs and devices' spools lie.")
    ] = Path("seedwire-state"),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The broker's port; 0: a free one.")
    ] = 4222,
    host: Annotated[
        str,
        typer.Option(
            help="Where the broker listens; 0.0.0.0 for devices elsewhere. Whoever reaches it can "
            "take part: use it on a network you trust."
        ),
    ] = HOST,
    telemetry_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Telemetry's port; 0: a free one.")
    ] = 9464,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DATA.jsonl", help="Also start this device; may be repeated."),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Held-out rows; the first --device is trusted to evaluate on them."),
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option(help="GGUF files, or directories of them, that the local devices hold."),
    ] = None,
    engine: options.Engine = "llama",
) -> None:
    """Run a broker, the aggregator, the scheduler and telemetry here, until Ctrl-C."""
    try:
        devices = _devices(device or [])
    except Usage as error:
        raise typer.Exit(told(error, EXIT_USAGE)) from error
    plan = Plan(
        state_dir, port, telemetry_port, devices, heldout, tuple(models or []), engine, host
    )

    failed = 0

    async def main(stop: Stop) -> None:
        nonlocal failed
        try:
            await up(plan, stop, lambda text: console.print(text, highlight=False, soft_wrap=True))
        except* ConfigError as group:  # not left to `run`, which logs it too: here both are stderr
            for error in group.exceptions:
                failed = told(error, EXIT_CONFIG)
        except* TransientError as group:
            for error in group.exceptions:
                failed = told(error, EXIT_FAILURE)

    code = run(main, drain_s=60.0)
    raise typer.Exit(code or failed)


@app.command("devices")
def list_devices(servers: options.Servers = LOCAL) -> None:
    """Show every device that the scheduler knows."""

    async def work(bus: NatsBus) -> None:
        console.print(await listing.devices(bus))

    talk(servers, work)


def _devices(given: list[str]) -> dict[str, Path]:
    devices: dict[str, Path] = {}
    for text in given:
        name, _, data = text.partition("=")
        if not name or not data:
            raise Usage(f"--device {text!r}: give NAME=DATA.jsonl")
        if name in devices:
            raise Usage(f"--device {name} is named twice")
        devices[name] = Path(data)
    return devices


def main() -> None:
    """Run the command that the command line names."""
    app(prog_name="seedwire")


if __name__ == "__main__":
    main()
