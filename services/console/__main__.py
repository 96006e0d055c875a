"""`seedwire`: the operator's commands."""

import sys
from pathlib import Path
from typing import Annotated, Literal, cast

import msgspec
import typer

from services.console import (
    access,
    blob_commands,
    device_commands,
    doctor,
    job_commands,
    keys_commands,
    listing,
    options,
    serve_commands,
)
from services.console.addresses import HOST
from services.console.chat import chat_command
from services.console.distil import distil
from services.console.export.command import export
from services.console.failure import EXIT_CONFIG, EXIT_FAILURE, EXIT_USAGE, Usage, told
from services.console.job_commands import LOCAL, talk
from services.console.printing import Printer, console
from services.console.up import Plan, up
from shared import logs
from shared.errors import ConfigError, TransientError
from shared.nats_bus import NatsBus
from shared.runtime import Stop, project_version, run

USAGE_ERROR = cast("type[Exception]", typer.BadParameter.__mro__[1])
"""A command line that cannot be understood; typer does not export it."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Tune a language model across devices that can only run it.",
    epilog="Begin with: seedwire up, and in another terminal: seedwire job submit --name first "
    "--model model.gguf --labels-from rows.jsonl --watch. If something is amiss: seedwire doctor. "
    "Commands take --json. Exit codes: 0 done, 1 failed, 2 wrong usage, 69 no broker or service "
    "answers, 75 could not drain in time, 78 a setting is wrong.",
)
app.add_typer(job_commands.commands, name="job")
app.add_typer(blob_commands.commands, name="blob")
app.add_typer(serve_commands.commands, name="serve")
app.add_typer(device_commands.commands, name="device")
app.add_typer(keys_commands.commands, name="keys")
app.command("export")(export)
app.command("chat")(chat_command)
app.command("distil")(distil)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(project_version(), highlight=False)
        raise typer.Exit


@app.callback()
def configure(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(envvar="SEEDWIRE_LOG_LEVEL", help="What to log, on stderr."),
    ] = "error",
    creds: Annotated[
        str,
        typer.Option(
            envvar="SEEDWIRE_CREDS",
            help="A NATS credentials file to log in with; if not set, that of `seedwire up`.",
        ),
    ] = "",
    ca: Annotated[
        str,
        typer.Option(
            envvar="SEEDWIRE_CA", help="A PEM file of who may vouch for the broker's certificate."
        ),
    ] = "",
    tls_name: Annotated[
        str,
        typer.Option(
            envvar="SEEDWIRE_TLS_NAME",
            help="What the broker's certificate must be made out to, if not its address.",
        ),
    ] = "",
) -> None:
    """Set up what all commands share."""
    logs.configure("console", level=log_level)
    access.given.creds, access.given.ca, access.given.tls_name = creds, ca, tls_name


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
            help="Where the broker listens; 0.0.0.0 for devices elsewhere, which it tells how to "
            "come in."
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
    serve_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the tuned model is served; 0: a free port.")
    ] = 8080,
    serve: Annotated[bool, typer.Option(help="Serve the tuned model.")] = True,
    large: Annotated[
        str,
        typer.Option(help="A large model of the same tokenizer, for the tuned one to steer: GGUF."),
    ] = "",
    validation: Annotated[
        Path | None,
        typer.Option(help="Rows by which the best of small, large and both together is found."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="No identities and no TLS: for trials on this machine alone."
        ),
    ] = False,
    engine: options.Engine = "llama",
) -> None:
    """Run a broker and all services here, until Ctrl-C; devices come in by their own keys."""
    try:
        devices = _devices(device or [])
    except Usage as error:
        raise typer.Exit(told(error, EXIT_USAGE)) from error
    plan = Plan(
        state_dir=state_dir,
        port=port,
        telemetry_port=telemetry_port,
        devices=devices,
        heldout=heldout,
        models=tuple(models or []),
        engine=engine,
        host=host,
        serve_port=serve_port if serve else None,
        large=large,
        validation=validation,
        secure=not insecure,
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
def list_devices(servers: options.Servers = LOCAL, as_json: options.Json = False) -> None:
    """Show every device that the scheduler knows."""
    printer = Printer(as_json=as_json)

    async def work(bus: NatsBus) -> None:
        devices = await listing.devices(bus)
        rows = [msgspec.to_builtins(device) | {"away": listing.away(device)} for device in devices]
        printer.result({"devices": rows}, listing.devices_table(devices))

    talk(servers, work, as_json=as_json)


app.command("doctor")(doctor.doctor_command)


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
    """Run the command that the command line names; wrong usage, too, is JSON with --json."""
    if "--json" not in sys.argv[1:]:
        app(prog_name="seedwire")
    try:
        code: object = app(prog_name="seedwire", standalone_mode=False)
    except USAGE_ERROR as error:
        text = cast("str", getattr(error, "format_message", error.__str__)())
        code = told(Usage(text), EXIT_USAGE, as_json=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
