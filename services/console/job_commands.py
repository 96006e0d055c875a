"""`seedwire job ...`: submit, list, stop, watch."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import typer

from services.console import listing, options
from services.console.client import ask, connected
from services.console.completion import LOCAL
from services.console.failure import Usage, outcome
from services.console.labels import labels_of, parse_labels
from services.console.printing import Printer
from services.console.spec import Table, Wanted, read_file, wanted
from services.console.submit import Submission, located, submit
from services.console.watch import watch
from shared import subjects
from shared.engine.protocol import Facts
from shared.messages import JobAccepted, StopJob
from shared.nats_bus import NatsBus

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
    tune_a: options.TuneA = None,
    targets: options.Targets = None,
    layers: options.Layers = None,
    prompt_text: options.PromptText = None,
    prompt_tokens: options.PromptTokens = None,
    method: options.Method = None,
    how: options.How = None,
    rounds: options.Rounds = None,
    directions: options.Directions = None,
    eps: options.Eps = None,
    step: options.Step = None,
    batch_rows: options.BatchRows = None,
    momentum: options.Momentum = None,
    local_steps: options.LocalSteps = None,
    pool: options.Pool = None,
    candidates: options.Candidates = None,
    variance: options.Variance = None,
    threshold: options.Threshold = None,
    deadline: options.Deadline = None,
    enough_devices: options.EnoughDevices = None,
    enough_probes: options.EnoughProbes = None,
    evaluate_every: options.EvaluateEvery = None,
    patience: options.Patience = None,
    epochs: options.Epochs = None,
    spec: options.Spec = None,
    watch_it: options.Watch = False,
    no_upload: options.NoUpload = False,
    url: options.Url = None,
    engine: options.Engine = "llama",
    as_json: options.Json = False,
) -> None:
    """Look into a model, build the job's adapter, upload the model and start the job."""
    printer = Printer(as_json=as_json)
    if pool is not None and directions is not None:
        raise typer.BadParameter("--pool is --directions by another name: give one of them")

    def given(rows: Path | None) -> dict[str, Table]:
        return {
            "task": {
                "labels": _labels(labels, rows),
                "template": _unescaped(template),
            },
            "adapter": {
                "kind": adapter,
                "rank": rank,
                "tune_a": tune_a,
                "targets": targets.split(",") if targets else None,
                "layers": layers,
                "prompt_text": _unescaped(prompt_text),
                "prompt_tokens": prompt_tokens,
            },
            "tuning": {
                "method": method,
                "how": how,
                "rounds": rounds,
                "directions": directions if pool is None else pool,
                "eps": eps,
                "step": step,
                "batch_rows": batch_rows,
                "momentum": momentum,
                "local_steps": local_steps,
                "candidates": candidates,
                "variance": variance,
                "threshold": threshold,
            },
            "pacing": {
                "deadline_s": deadline,
                "enough_devices": enough_devices,
                "enough_probes": enough_probes,
            },
            "evaluation": {"every_rounds": evaluate_every, "patience": patience},
        }

    async def command() -> None:
        rows = await located(labels_from, data_set=True) if labels_from else None
        flags, file = given(rows), read_file(spec) if spec else {}
        file |= {} if epochs is None else {"epochs": epochs}
        asked = wanted(flags, file)

        def otherwise(facts: Facts) -> Wanted:
            return wanted(flags, file, last_block=False, own_rows=not facts.tied)

        path = await located(model, data_set=False)
        submission = Submission(name, path, asked, otherwise, not no_upload, url, engine)
        submission.check()
        async with connected(servers) as bus:
            await submit(bus, submission, printer)
            if watch_it:
                await watch(bus, name, printer)

    raise typer.Exit(outcome(command(), as_json=as_json))


@commands.command("list")
def list_jobs(servers: options.Servers = LOCAL, as_json: options.Json = False) -> None:
    """Show every job and how far it is."""
    printer = Printer(as_json=as_json)

    async def work(bus: NatsBus) -> None:
        jobs = await listing.jobs(bus)
        printer.result({"jobs": jobs}, listing.jobs_table(jobs))

    talk(servers, work, as_json=as_json)


@commands.command("stop")
def stop_job(
    name: options.JobName, servers: options.Servers = LOCAL, as_json: options.Json = False
) -> None:
    """End a job; its adapter stays as the last close left it."""
    printer = Printer(as_json=as_json)

    async def work(bus: NatsBus) -> None:
        _check_name(name)
        await ask(bus, subjects.JOB_STOP, StopJob(job=name), JobAccepted)
        printer.result({"job": name, "stopping": True}, f"job {name} ends")

    talk(servers, work, as_json=as_json)


@commands.command("watch")
def watch_job(
    name: options.JobName, servers: options.Servers = LOCAL, as_json: options.Json = False
) -> None:
    """Follow a job to its end, or show what came of one that is over.

    With --json: the facts of the job's log, one a line, as the message types name them.
    """
    printer = Printer(as_json=as_json)

    async def work(bus: NatsBus) -> None:
        _check_name(name)
        await watch(bus, name, printer)

    talk(servers, work, as_json=as_json)


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
    both = found | named
    if len(both) < 2:
        if labels_from:
            raise Usage(
                f"--labels-from {labels_from}: all rows have the one label {min(both)!r}; "
                "a job wants at least two"
            )
        raise Usage("--labels: name at least two, for example --labels World,Sports")
    return both


def _unescaped(template: str | None) -> str | None:
    r"""`\n` and `\t` as a shell passes them become the characters."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")
