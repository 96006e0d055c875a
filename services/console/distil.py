"""`seedwire distil`: a process of the distiller's own, with this console's way into the fleet."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.console import access, options
from services.console.failure import EXIT_CONFIG, EXIT_INTERRUPTED, told
from services.console.job_commands import LOCAL
from shared.errors import ConfigError

LEARNING, MODELS = "Learning", "Models and rows"


def distil(
    job: Annotated[str, typer.Argument(help="The job, which waits for its next epoch.")],
    small: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="The float checkpoint of the job's model, a folder for transformers.",
            rich_help_panel=MODELS,
        ),
    ],
    large: Annotated[
        Path,
        typer.Option(
            metavar="FILE.gguf",
            help="The large model, which has the same tokenizer.",
            rich_help_panel=MODELS,
        ),
    ],
    public: Annotated[
        Path,
        typer.Option(
            metavar="ROWS.jsonl",
            help="Public rows such as the devices have; labels may be missing.",
            rich_help_panel=MODELS,
        ),
    ],
    servers: options.Servers = LOCAL,
    heldout: Annotated[
        Path | None,
        typer.Option(
            metavar="ROWS.jsonl",
            help="Public rows to judge by (a fifth of --public).",
            rich_help_panel=MODELS,
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=2, help="Rows that are read (2000).", rich_help_panel=MODELS)
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the models' answers are kept (~/.cache/seedwire/distiller).",
            rich_help_panel=MODELS,
        ),
    ] = None,
    max_cache_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Bytes of answers kept, past which those unused for longest go (4 GiB).",
            rich_help_panel=MODELS,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=10.0,
            help="How strongly the small model steers the large one (1).",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    answers: Annotated[
        float | None,
        typer.Option(
            "--lambda",
            min=0.0,
            max=100.0,
            help="Weight of the public rows' own answers (0.5).",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that are told apart at each place (64).", rich_help_panel=LEARNING
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.1, max=10.0, help="Of both sides (1).", rich_help_panel=LEARNING),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of Adam (so many as read each row twice).",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a step (16).", rich_help_panel=LEARNING)
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Adam's rate at first (0.003).", rich_help_panel=LEARNING)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="What torch computes the small model on: cpu, cuda (cpu).",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Open the epoch even if the small model's held-out loss rose."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Teach the small model what it and a large one say together, and open the next epoch.

    The devices go on from the distilled adapter. Needs the extra `distil` on this machine.
    """
    given: dict[str, object] = {
        "job": job,
        "small": small,
        "large": large,
        "public": public,
        "heldout": heldout,
        "rows": rows,
        "cache": cache,
        "max-cache-bytes": max_cache_bytes,
        "alpha": alpha,
        "answers": answers,
        "top-k": top_k,
        "temperature": temperature,
        "steps": steps,
        "batch-rows": batch_rows,
        "rate": rate,
        "device": device,
    }
    try:
        fleet = access.resolved([server.strip() for server in servers.split(",")])
    except ConfigError as error:
        raise typer.Exit(told(error, EXIT_CONFIG, as_json=as_json)) from error
    given |= {"creds-file": fleet.creds_file, "ca-file": fleet.ca_file, "tls-name": fleet.tls_name}
    arguments = [f"--{name}={value}" for name, value in given.items() if value not in (None, "")]
    arguments += ["--servers", *fleet.servers, "--log-level", "warning"]
    arguments += [*(["--force"] if force else []), *(["--json"] if as_json else [])]
    command = [sys.executable, "-m", "services.distiller", *arguments]
    try:
        done = subprocess.run(command, check=False)  # noqa: S603 - our own module
    except KeyboardInterrupt:  # it has heard it too
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(done.returncode)
