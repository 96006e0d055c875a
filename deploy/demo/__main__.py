"""`make demo`: nats-server, the services and eight devices tune a model on this machine.

The private data is text that is already here: paragraphs of the Python standard library's
documentation, a few modules a device. Three devices sit behind bad links, one is killed in the
middle and started again. At the end a witness says whether anything was lost or counted twice.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.demo import build_data, families
from deploy.demo.identities import Identities
from deploy.demo.link import BAD, CLEAR, Link
from deploy.demo.outcome import Outcome, shown
from deploy.demo.processes import ROOT, Child
from deploy.demo.witness import examine
from shared import nats_bus, subjects
from shared.broker import start_broker
from shared.codec import decode
from shared.errors import RejectError
from shared.log import follow
from shared.logs import configure
from shared.messages import (
    AdapterEvaluated,
    DeviceReport,
    JobEnded,
    RoundClosed,
)

JOB = "demo"
DEVICES = 8
BEHIND_BAD_LINKS = (3, 5, 7)
KILLED = 6
KILLED_FOR_S = 5.0
MODEL = ROOT / "deploy" / "demo" / "model" / "seedwire-demo-q8_0.gguf"
ROUNDS = {"exact": 120, "probe": 12}
"""By how slopes are measured; the job's other settings are in `<how>.toml`."""
TUNING_LIMIT_S = {"exact": 480.0, "probe": 1800.0}
CATCH_UP_S = 60.0


@dataclass
class Demo:
    """One run: its folder, its processes, and what is known of it so far."""

    folder: Path
    console: Console
    links: list[Link] = field(default_factory=list[Link])
    devices: list[Child] = field(default_factory=list[Child])
    services: list[Child] = field(default_factory=list[Child])
    rounds: int = 0
    kills: int = 0
    accuracies: dict[int, float] = field(default_factory=dict[int, float])
    """By the round that opened with the adapter."""
    positions: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def identities(self) -> Identities:
        return Identities(self.folder / "keys")

    def service(self, name: str, url: str, *more: str) -> Child:
        log = self.folder / "logs" / f"{name}.log"
        arguments = ["--servers", url, *self.identities.arguments(name), *more]
        return Child(name, f"services.{name}", arguments, log)

    def device(self, number: int, port: int, ticket: str) -> Child:
        """Device `number`; the first one is trusted with the held-out rows as well."""
        name = f"device-{number}"
        arguments = ["--device", name, "--servers", f"nats://127.0.0.1:{port}"]
        arguments += ["--data", str(self.folder / "data" / "devices" / f"{name}.jsonl")]
        arguments += ["--state-dir", str(self.folder / "state" / name)]
        if number == 1:
            heldout = self.folder / "data" / "heldout.jsonl"
            arguments += ["--heldout", str(heldout), "--trusted", "true"]
        log = self.folder / "logs" / f"{name}.log"
        return Child(name, "edge_client", arguments, log, {"SEEDWIRE_EDGE_TICKET": ticket})

    def measure(self) -> None:
        for child in self.devices:
            child.measure()

    @property
    def model_bytes(self) -> int:
        """What fetching the model comes to, once a device."""
        return MODEL.stat().st_size * len(self.devices)

    @property
    def bytes_up(self) -> int:
        return sum(link.bytes_up for link in self.links)

    @property
    def bytes_down(self) -> int:
        return sum(link.bytes_down for link in self.links)


async def run(labels: str, how: str, build: Path) -> int:
    """The whole demo; the exit code says whether everything held."""
    console = Console()
    folder = build / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    demo = Demo(folder, console)
    console.print("[bold]Building the private data[/] from this Python's documentation strings")
    build_data.main(["--out", str(folder / "data"), "--labels", labels])
    chance = random.Random(1)  # noqa: S311 - the weather of a demo
    security = demo.identities.make()
    async with start_broker(folder / "nats", security=security) as broker:
        try:
            demo.services = [
                demo.service("registrar", broker.url),
                demo.service("aggregator", broker.url),
                demo.service("scheduler", broker.url),
                demo.service("telemetry", broker.url, "--port", "0"),
            ]
            for child in demo.services:
                await child.start()
            ticket = await demo.identities.ticket(broker.url, DEVICES)
            for number in range(1, DEVICES + 1):
                weather = BAD if number in BEHIND_BAD_LINKS else CLEAR
                link = Link(broker.port, weather, random.Random(chance.random()))  # noqa: S311
                await link.start()
                demo.links.append(link)
                demo.devices.append(demo.device(number, link.port, ticket))
            for child in demo.devices:
                await child.start()
            console.print(
                f"[bold]Running[/] nats-server, {len(demo.services)} services and {DEVICES} devices"
                f" ({len(BEHIND_BAD_LINKS)} behind bad links), each by its own key and under TLS; "
                f"logs in {folder / 'logs'}"
            )
            outcome = await tune(demo, broker.url, how)
        finally:
            for child in [*demo.devices, *demo.services]:
                if child.process is not None:
                    await child.stop()
            for link in demo.links:
                await link.stop()
    outcome.labels = labels
    (build / "demo.json").write_text(json.dumps(outcome.figures(), indent=2) + "\n")
    console.print(shown(outcome))
    problems = outcome.problems()
    for problem in problems:
        console.print(f"[bold red]✗[/] {problem}")
    return 1 if problems else 0


async def tune(demo: Demo, url: str, how: str) -> Outcome:
    """Submit the job, watch it to its end, and let the witness speak."""
    access = demo.identities.access(url)
    bus = await nats_bus.connect([url], name="demo", credentials=access.credentials())
    try:
        async with asyncio.TaskGroup() as tasks:
            reports = tasks.create_task(hear_reports(demo, bus))
            await submit(demo, url, how)
            began = time.monotonic()
            try:
                async with asyncio.timeout(TUNING_LIMIT_S[how]):
                    await watch(demo, bus, ROUNDS[how])
            except TimeoutError:
                logs = demo.folder / "logs"
                raise SystemExit(
                    f"the job did not end within {TUNING_LIMIT_S[how]:.0f} s; see {logs}"
                ) from None
            tuning_s = time.monotonic() - began
            demo.measure()
            await caught_up(demo)
            reports.cancel()
    finally:
        await bus.close()
    ledgers = sorted((demo.folder / "state").glob("*/**/ledger.jsonl"))
    verdict = await examine(url, JOB, ledgers, **demo.identities.login())
    device_rounds = max(1, demo.rounds) * DEVICES
    return Outcome(
        accuracy_before=demo.accuracies[min(demo.accuracies)],
        accuracy_after=demo.accuracies[max(demo.accuracies)],
        accuracy_majority=1 / len(families.FAMILIES),
        tuning_seconds=tuning_s,
        devices=DEVICES,
        positions=demo.positions,
        verdict=verdict,
        bytes_up_per_device_round=demo.bytes_up / device_rounds,
        bytes_down_per_device_round=(demo.bytes_down - demo.model_bytes) / device_rounds,
        daemon_peak_rss_mb=max(child.peak_rss_mb for child in demo.devices),
        engine_peak_rss_mb=max(child.children_peak_rss_mb for child in demo.devices),
        link_cuts=sum(link.cuts for link in demo.links),
        kills=demo.kills,
    )


async def submit(demo: Demo, url: str, how: str) -> None:
    """Submit the job with the operator's own command."""
    access = demo.folder / "access.toml"
    demo.identities.access(url).save(access)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.console", "job", "submit", "--servers", url),
        *("--name", JOB, "--model", str(MODEL), "--spec", str(ROOT / f"deploy/demo/{how}.toml")),
        *("--template", families.PROMPT_TEMPLATE, "--labels", ",".join(families.FAMILIES)),
        *("--rounds", str(ROUNDS[how])),
        cwd=ROOT,
        env={**os.environ, "SEEDWIRE_FLEET": str(access)},
    )
    if await process.wait():
        raise SystemExit("the job was not accepted; see above")


async def watch(demo: Demo, bus: nats_bus.NatsBus, rounds: int) -> None:
    """Follow the job to its end, killing one device on the way."""
    columns = (
        TextColumn("round {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("held-out {task.fields[accuracy]}  loss {task.fields[loss]}"),
        TextColumn("up {task.fields[up]:.0f} kB  down {task.fields[down]:.0f} kB"),
        TimeElapsedColumn(),
    )
    killing: asyncio.Task[None] | None = None
    with Progress(*columns, console=demo.console) as progress:
        bar = progress.add_task("", total=rounds, accuracy="-", loss="-", up=0.0, down=0.0)
        async for _, event in follow(bus, bus, JOB, check_s=10.0):
            match event:
                case RoundClosed(commit=commit) if commit is not None:
                    demo.rounds += 1
                    loss = f"{event.loss:.3f}" if event.loss is not None else "-"
                    up, down = demo.bytes_up / 1000, (demo.bytes_down - demo.model_bytes) / 1000
                    progress.update(bar, completed=demo.rounds, loss=loss, up=up, down=down)
                    if demo.rounds % 10 == 0:
                        demo.measure()
                    if demo.rounds == max(2, rounds // 3):
                        killing = asyncio.create_task(power_cut(demo, demo.devices[KILLED - 1]))
                case AdapterEvaluated():
                    demo.accuracies[event.round] = event.correct / event.examples
                    accuracy = f"{demo.accuracies[event.round]:.1%}"
                    progress.update(bar, accuracy=accuracy)
                    if not demo.console.is_terminal:
                        demo.console.print(f"round {event.round}: held-out accuracy {accuracy}")
                case JobEnded():
                    break
                case _:
                    pass
    if killing is not None:
        await killing


async def power_cut(demo: Demo, device: Child) -> None:
    """Kill a device with SIGKILL and start it again a little later."""
    await device.kill()
    demo.kills += 1
    demo.console.print(f"{device.name} killed (SIGKILL); starting it again in {KILLED_FOR_S:.0f} s")
    await asyncio.sleep(KILLED_FOR_S)
    await device.start()


async def hear_reports(demo: Demo, bus: nats_bus.NatsBus) -> None:
    """Keep what each device says of where its adapter stands."""
    async with bus.subscribe(subjects.ALL_REPORTS) as deliveries:
        async for delivery in deliveries:
            try:
                report = decode(delivery.data, DeviceReport)
            except RejectError:
                continue
            if JOB in report.positions:
                demo.positions[report.device] = report.positions[JOB]


async def caught_up(demo: Demo) -> None:
    """Wait until every device has said that it stands at the end of the job."""
    deadline = time.monotonic() + CATCH_UP_S
    while time.monotonic() < deadline:
        ends = set(demo.positions.values())
        if len(demo.positions) == DEVICES and len(ends) == 1:
            return
        await asyncio.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--labels", choices=["true", "shuffled"], default="true")
    parser.add_argument("--how", choices=list(ROUNDS), default="exact")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where all of it goes")
    arguments = parser.parse_args()
    configure("demo", level="error")
    return asyncio.run(run(arguments.labels, arguments.how, arguments.build))


if __name__ == "__main__":
    sys.exit(main())
