"""`seedwire doctor`: everything that should be well, looked at, and what is not with its mend."""

import asyncio
import contextlib
import urllib.request
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from services.console import broker_checks, listing, local_checks, options
from services.console.client import ask, connected
from services.console.completion import LOCAL
from services.console.failure import EXIT_FAILURE, Failure, Usage, outcome
from services.console.finding import Finding, ok, problem, warning
from services.console.local_checks import RunningJob
from services.console.printing import Printer
from shared import log, subjects
from shared.bus import Link
from shared.codec import decode_manifest
from shared.errors import ConfigError, MalformedMessage, TransientError
from shared.messages import (
    EpochOpened,
    IdentitiesListed,
    JobOpened,
    JobsListed,
    JobSummary,
    ListIdentities,
    ListJobs,
    Variant,
)
from shared.nats_bus import NatsBus

PROBLEMS_SHOWN = 10
TELEMETRY = "http://127.0.0.1:9464"
HTTP_S = 3.0
START = "start it: `seedwire up` runs all services; its log says why it ended"
STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True, slots=True)
class Examination:
    """What should be looked at."""

    servers: str
    model: Path | None = None
    data: Path | None = None
    state_dir: Path = Path("seedwire-state")
    telemetry: str = TELEMETRY
    serving: str | None = None
    engine: Literal["llama", "fake"] = "llama"


async def examine(examination: Examination) -> list[Finding]:
    """Everything that was found, in the order in which one thing needs another."""
    found, jobs = await _fleet(examination.servers)
    mend = "start it, or say where it is: --telemetry http://host:port"
    found += await _over_http("telemetry", examination.telemetry, "/metrics", mend)
    if (serving := examination.serving) is not None:
        mend = "start it: `seedwire up` serves the tuned model unless told not to"
        found += await _over_http("serving", serving, "/health", mend)
    found += local_checks.packages()
    found += local_checks.disk(examination.state_dir)
    if (model := examination.model) is not None:
        found += await local_checks.model(model, jobs, examination.engine)
    if (data := examination.data) is not None:
        found += await asyncio.to_thread(local_checks.data, data, jobs)
    return found


async def _fleet(servers: str) -> tuple[list[Finding], list[RunningJob]]:
    """The broker and everybody behind it, and the jobs that run."""
    found: list[Finding] = []
    reachable = secured = False
    for server in servers.split(","):
        greeted, greeting = await broker_checks.greeting(server.strip())
        found += greeted
        reachable = reachable or greeting is not None or not greeted
        secured = secured or (greeting is not None and greeting.auth_required)
    if not reachable:
        return found, []
    try:
        async with connected(servers) as bus:
            found += await broker_checks.link(bus)
            store = await broker_checks.store(bus)
            found += store
            if any(one.check == "jetstream" and one.state == "problem" for one in store):
                return found, []
            services, jobs = await _services(bus, secured=secured)
            return found + services, jobs
    except (Failure, ConfigError) as error:
        mend = "give the credentials that it wants: --creds, --ca, or SEEDWIRE_FLEET"
        return [*found, problem("broker", str(error), mend)], []


async def _services(bus: NatsBus, *, secured: bool) -> tuple[list[Finding], list[RunningJob]]:
    (aggregator, running), scheduler, registrar = await asyncio.gather(
        _aggregator(bus), _scheduler(bus), _registrar(bus, secured=secured)
    )
    return [*aggregator, *scheduler, *registrar], running


async def _aggregator(bus: NatsBus) -> tuple[list[Finding], list[RunningJob]]:
    try:
        listed = await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed)
        jobs = [job for job in listed.jobs if job.status != "ended"]
        running = [await _running(bus, job) for job in jobs]
    except Failure as failure:
        return [problem("aggregator", str(failure), START)], []
    except TransientError as error:
        return [problem("aggregator", f"the job log cannot be read: {error}", START)], []
    text = f"answers; {len(jobs)} of {len(listed.jobs)} jobs are running"
    waiting = [job.job for job in jobs if job.status == "waiting"]
    if waiting:
        text += f", of which {', '.join(waiting[:PROBLEMS_SHOWN])} wait for their next epoch"
    return [ok("aggregator", text)], [job for job in running if job is not None]


async def _scheduler(bus: NatsBus) -> list[Finding]:
    try:
        return _devices(await listing.devices(bus))
    except Failure as failure:
        return [problem("scheduler", str(failure), START)]


async def _registrar(bus: NatsBus, *, secured: bool) -> list[Finding]:
    """Whether devices can be let in; a broker that asks for nothing has no registrar."""
    if not secured:
        return []
    try:
        known = await ask(bus, subjects.IDENTITY_LIST, ListIdentities(), IdentitiesListed)
    except Failure as failure:
        mend = f"{START}; devices that are enrolled already come in without it"
        return [warning("registrar", str(failure), mend)]
    return [ok("registrar", f"answers; it knows {len(known.identities)} devices")]


async def _over_http(service: str, url: str, path: str, mend: str) -> list[Finding]:
    """Whether a service answers where it can be asked over HTTP; none but people depend on it."""
    if not url.startswith(("http://", "https://")):
        raise Usage(f"--{service} {url}: give http://host:port")

    def asked() -> None:
        # The address has been checked: it is http or https.
        with urllib.request.urlopen(f"{url.rstrip('/')}{path}", timeout=HTTP_S):  # noqa: S310
            pass

    try:
        await asyncio.to_thread(asked)
    except OSError as error:
        return [warning(service, f"does not answer at {url}: {error}", mend)]
    return [ok(service, f"answers at {url}")]


def _devices(devices: Sequence[listing.DeviceSummary]) -> list[Finding]:
    present = [device for device in devices if not listing.away(device)]
    text = f"answers; {len(present)} of {len(devices)} devices heard lately"
    if not present:
        mend = "start one: seedwire-edge --device NAME --data rows.jsonl --servers ADDRESS"
        return [ok("scheduler", "answers"), warning("devices", "none is heard", mend)]
    troubled = [device for device in present if device.problem]
    found = [ok("scheduler", text)]
    for device in troubled[:PROBLEMS_SHOWN]:
        reason, _, mend = device.problem.rpartition("; ")
        if not reason:
            reason, mend = mend, "see its log"
        found.append(warning(f"device {device.device}", reason, mend))
    if len(troubled) > PROBLEMS_SHOWN:
        more = f"{len(troubled) - PROBLEMS_SHOWN} more have a problem"
        found.append(warning("devices", more, "see `seedwire devices`"))
    return found


async def _running(bus: Link, job: JobSummary) -> RunningJob | None:
    """The job's task and models, as its log tells them."""
    task, variants = None, list[Variant]()
    facts = log.read(bus, subjects.LOG_STREAM, subjects.log(job.job))
    async with aclosing(facts):
        async for _, fact in facts:
            if isinstance(fact, JobOpened):
                task = fact.spec.task
            elif isinstance(fact, EpochOpened):
                with contextlib.suppress(MalformedMessage):
                    variants += decode_manifest(fact.manifest).variants
                break
    return None if task is None else RunningJob(job.job, task, tuple(variants))


def doctor_command(
    servers: options.Servers = LOCAL,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also look into this GGUF: can it be tuned?"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also read this file of rows: which can be used?"),
    ] = None,
    state_dir: Annotated[
        Path, typer.Option(help="Where `seedwire up` keeps its state, if on this machine.")
    ] = Path("seedwire-state"),
    telemetry: Annotated[
        str, typer.Option(metavar="URL", help="Where telemetry's metrics are.")
    ] = TELEMETRY,
    serving: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Also ask the API that serves the tuned model."),
    ] = None,
    engine: options.Engine = "llama",
    as_json: options.Json = False,
) -> None:
    """Check broker, streams, services, devices, a model and data; say the mend of what is amiss.

    Exit code 0 if all is well or works all the same, 1 if something does not work.
    """
    printer = Printer(as_json=as_json)
    failed = False

    async def command() -> None:
        nonlocal failed
        findings = await examine(
            Examination(servers, model, data, state_dir, telemetry, serving, engine)
        )
        failed = any(one.state == "problem" for one in findings)
        if as_json:
            printer.line({"ok": not failed, "findings": findings})
            return
        for one in findings:
            state = Text(f"{one.state:8} ", style=STYLES[one.state])
            printer.people.print(state, Text(f"{one.check}: {one.text}"), sep="", soft_wrap=True)
            if one.mend:
                printer.remark(f"{'':8} -> {one.mend}")

    code = outcome(command(), as_json=as_json)
    raise typer.Exit(code or (EXIT_FAILURE if failed else 0))
