"""`seedwire up`: a broker, the services and, if asked, devices, all on this machine."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.console.addresses import EVERYWHERE, HOST, check_free, free_port, outward_address
from services.console.children import Program, Supervisor
from services.console.state_lock import locked
from shared import nats_bus, subjects
from shared.broker import BrokerProcess
from shared.clock import backoff_s
from shared.codec import encode
from shared.errors import ConfigError, TransientError
from shared.messages import ListDevices, ListJobs, Message
from shared.runtime import Stop

READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What should run."""

    state_dir: Path
    port: int = 4222
    telemetry_port: int = 9464
    devices: dict[str, Path] = field(default_factory=dict[str, Path])
    """Local devices and their data; the first is trusted with `heldout`."""
    heldout: Path | None = None
    models: tuple[Path, ...] = ()
    engine: str = "llama"
    host: str = HOST
    """Where the broker listens; devices elsewhere need more than this machine's own address."""

    def check(self) -> None:
        """Find what cannot work before anything is started.

        Raises:
            ConfigError: names the file or the device.
        """
        for device, data in self.devices.items():
            if not subjects.NAME.match(device):
                raise ConfigError(f"--device {device!r}: use 1 to 64 of A-Z a-z 0-9 _ -")
            if not data.is_file():
                raise ConfigError(f"--device {device}: there is no file {data}")
        if self.heldout and not self.heldout.is_file():
            raise ConfigError(f"--heldout: there is no file {self.heldout}")
        if self.heldout and not self.devices:
            raise ConfigError("--heldout belongs to the first --device; name one")

    def programs(self, url: str, telemetry_port: int) -> list[Program]:
        """The services and devices as child processes."""
        at = ["--servers", url]
        telemetry = [*at, "--host", HOST, "--port", str(telemetry_port)]
        services = [
            Program("aggregator", "services.aggregator", at),
            Program("scheduler", "services.scheduler", at),
            Program("telemetry", "services.telemetry", telemetry),
        ]
        return services + [
            Program(
                f"device-{device}", "edge_client", [*at, *self._device(device, first=not number)]
            )
            for number, device in enumerate(self.devices)
        ]

    def _device(self, device: str, *, first: bool) -> list[str]:
        arguments = ["--device", device, "--data", str(self.devices[device].resolve())]
        arguments += ["--state-dir", str(self.state_dir.resolve() / "devices" / device)]
        arguments += ["--engine", self.engine]
        if first and self.heldout:
            arguments += ["--heldout", str(self.heldout.resolve()), "--trusted", "true"]
        if self.models:
            arguments += ["--models", *(str(path.resolve()) for path in self.models)]
        return arguments


async def up(plan: Plan, stop: Stop, say: Callable[[str], None]) -> None:
    """Run all of `plan` until the stop; then drain the services, and the broker last.

    Raises:
        ConfigError: something cannot run as configured; all else has been drained.
    """
    plan.check()
    async with locked(plan.state_dir, say) as held:
        check_free(plan.host, plan.port, "--port")
        check_free(HOST, plan.telemetry_port, "--telemetry-port")
        await _run(plan, held, stop, say)


async def _run(plan: Plan, held: int, stop: Stop, say: Callable[[str], None]) -> None:
    """Broker and programs run until the stop; each inherits the descriptor `held`."""
    store = plan.state_dir / "broker"
    broker = BrokerProcess(store, host=plan.host, port=plan.port, inherits=(held,))
    await broker.start()
    url = f"nats://{HOST if plan.host == EVERYWHERE else plan.host}:{broker.port}"
    supervisor = Supervisor(plan.state_dir / "logs", stop, say, (held,))
    telemetry_port = plan.telemetry_port or free_port()
    try:
        async with asyncio.TaskGroup() as tasks:
            attendants = [
                tasks.create_task(_keep_broker(broker, stop, say)),
                tasks.create_task(_announce(plan, url, telemetry_port, say)),
            ]
            programs = plan.programs(url, telemetry_port)
            children = [tasks.create_task(supervisor.keep(program)) for program in programs]
            await stop.wait()
            say("stopping")
            await asyncio.wait(children)
            for attendant in attendants:
                attendant.cancel()
    finally:
        await broker.stop()


async def _keep_broker(broker: BrokerProcess, stop: Stop, say: Callable[[str], None]) -> None:
    """The broker is started again on its port and store whenever it ends."""
    attempt = 0
    while True:
        await broker.wait()
        await broker.kill()
        if stop.asked:
            return
        attempt += 1
        delay_s = backoff_s(attempt)
        say(f"the broker ended, starts again in {delay_s:.1f} s")
        if await stop.sleep(delay_s):
            return
        with contextlib.suppress(TransientError):
            await broker.start()


async def _announce(plan: Plan, url: str, telemetry_port: int, say: Callable[[str], None]) -> None:
    """Say where everything is, once the services answer."""
    bus = await nats_bus.connect([url], name="up")
    try:
        async with asyncio.timeout(READY_S):
            await _answered(bus, subjects.JOB_LIST, ListJobs())
            await _answered(bus, subjects.DEVICE_LIST, ListDevices())
    except TimeoutError:
        say(f"the services are slow to start; their logs are in {plan.state_dir / 'logs'}")
    finally:
        await bus.close()
    option = "" if plan.port == 4222 else f" --servers {url}"
    example = next(iter(plan.devices.values()), Path("data.jsonl"))
    port = url.rpartition(":")[2]
    devices = f"devices    nats://{outward_address()}:{port}\n" if plan.host == EVERYWHERE else ""
    say(
        f"broker     {url}\n{devices}"
        f"telemetry  http://{HOST}:{telemetry_port}/metrics, /jobs, /devices\n"
        f"logs       {plan.state_dir / 'logs'}\n"
        f"next:      seedwire devices{option}\n"
        f"           seedwire job submit --name first --model model.gguf "
        f"--labels-from {example} --watch{option}"
    )


async def _answered(bus: nats_bus.NatsBus, subject: str, question: Message) -> None:
    """Return when somebody answers on `subject`."""
    while True:
        try:
            await bus.request(subject, encode(question), timeout_s=2.0)
        except TransientError:
            await asyncio.sleep(0.2)
        else:
            return
