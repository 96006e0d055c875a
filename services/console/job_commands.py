"""`seedwire job ...`: submit, list, stop, watch."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import typer

from services.console import listing, options
from services.console.client import ask, connected
from services.console.failure import Usage, outcome
from services.console.labels import labels_of, parse_labels
from services.console.printing import console
from services.console.spec import Table, read_file, wanted
from services.console.submit import Submission, submit
from services.console.watch import watch
from shared import subjects
from shared.messages import JobAccepted, StopJob
from shared.nats_bus import NatsBus

LOCAL = "nats://127.0.0.1:4222"

commands = typer.Typer(no_args_is_help=True, help="Submit, list, stop and watch jobs.")
Work = Callable[[NatsBus], Awaitable[object]]


def talk(servers: str, work: Work, *, as_json: bool = False) -> None:
    """Connect, do `work`, and exit with the code of how it went; `as_json`: errors as JSON."""

    async def command() -> None:
        async with connected(servers) as bus:
            await work(bus)

    raise typer.Exit(outcome(command(), as_json=as_json))


@commands.command("submit")
def submit_job(
    name: options.Name,
    model: options.Model,
    servers: options.Servers = LOCAL,
    labels: options.Labels = None,
    labels_from: options.LabelsFrom = None,
    template: options.Template = None,
    adapter: options.Adapter = None,
    rank: options.Rank = None,
    targets: options.Targets = None,
    layers: options.Layers = None,
    how: options.How = None,
    rounds: options.Rounds = None,
    directions: options.Directions = None,
    eps: options.Eps = None,
    step: options.Step = None,
    batch_rows: options.BatchRows = None,
    momentum: options.Momentum = None,
    deadline: options.Deadline = None,
    enough_devices: options.EnoughDevices = None,
    enough_probes: options.EnoughProbes = None,
    evaluate_every: options.EvaluateEvery = None,
    spec: options.Spec = None,
    watch_it: options.Watch = False,
    no_upload: options.NoUpload = False,
    url: options.Url = None,
    engine: options.Engine = "llama",
) -> None:
    """Look into a model, build the job's adapter, upload the model and start the job."""

    def given() -> dict[str, Table]:
        return {
            "task": {
                "labels": _labels(labels, labels_from),
                "template": _unescaped(template),
            },
            "adapter": {
                "kind": adapter,
                "rank": rank,
                "targets": targets.split(",") if targets else None,
                "layers": layers,
            },
            "tuning": {
                "how": how,
                "rounds": rounds,
                "directions": directions,
                "eps": eps,
                "step": step,
                "batch_rows": batch_rows,
                "momentum": momentum,
            },
            "pacing": {
                "deadline_s": deadline,
                "enough_devices": enough_devices,
                "enough_probes": enough_probes,
            },
            "evaluation": {"every_rounds": evaluate_every},
        }

    async def command() -> None:
        asked = wanted(given(), read_file(spec) if spec else {})
        submission = Submission(name, model, asked, not no_upload, url, engine)
        submission.check()
        async with connected(servers) as bus:
            await submit(bus, submission, console)
            if watch_it:
                await watch(bus, name, as_json=False, console=console)

    raise typer.Exit(outcome(command()))


@commands.command("list")
def list_jobs(servers: options.Servers = LOCAL) -> None:
    """Show every job and how far it is."""

    async def work(bus: NatsBus) -> None:
        console.print(await listing.jobs(bus))

    talk(servers, work)


@commands.command("stop")
def stop_job(name: str, servers: options.Servers = LOCAL) -> None:
    """End a job; its adapter stays as the last close left it."""

    async def work(bus: NatsBus) -> None:
        _check_name(name)
        await ask(bus, subjects.JOB_STOP, StopJob(job=name), JobAccepted)
        console.print(f"job {name} ends")

    talk(servers, work)


@commands.command("watch")
def watch_job(name: str, servers: options.Servers = LOCAL, as_json: options.Json = False) -> None:
    """Follow a job to its end, or show what came of one that is over."""

    async def work(bus: NatsBus) -> None:
        _check_name(name)
        await watch(bus, name, as_json=as_json, console=console)

    talk(servers, work)


def _check_name(name: str) -> None:
    if not subjects.NAME.match(name):
        raise Usage(f"{name!r} is no job's name: 1 to 64 of A-Z a-z 0-9 _ -")


def _labels(labels: str | None, labels_from: Path | None) -> dict[str, str] | None:
    """Those of the file, where there is one; the words that `labels` names win."""
    if labels is None and labels_from is None:
        return None
    found = labels_of(labels_from) if labels_from else {}
    named = parse_labels(labels) if labels else {}
    if labels_from and named.keys() - found.keys():
        raise Usage(f"--labels: {min(named.keys() - found.keys())!r} is no label in {labels_from}")
    return found | named


def _unescaped(template: str | None) -> str | None:
    r"""`\n` and `\t` as a shell passes them become the characters."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")
