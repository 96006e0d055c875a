"""`seedwire up`: a broker, the services and, if asked, devices, all on this machine."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import msgspec

from services.console import access
from services.console.addresses import EVERYWHERE, HOST, check_free, free_port, outward_address
from services.console.children import Program, Supervisor
from services.console.client import Unanswered
from services.console.failure import Failure
from services.console.handshakes import Handshakes
from services.console.inviting import invited
from services.console.state_lock import locked
from shared import nats_bus, subjects
from shared.broker import BrokerProcess
from shared.clock import backoff_s
from shared.codec import encode
from shared.errors import ConfigError, TransientError
from shared.identity import files
from shared.identity.access import TLS_NAME, Access
from shared.identity.authority import Authority
from shared.messages import (
    InviteDevices,
    ListDevices,
    ListIdentities,
    ListJobs,
    Message,
)
from shared.runtime import Stop

READY_S = 60.0
INVITED_S = 24 * 3600.0
PROXY = "services.proxy_inference"
TICKET = "SEEDWIRE_EDGE_TICKET"


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
    serve_port: int | None = None
    """Where the tuned model is served; None: nowhere."""
    large: str = ""
    """What the served model steers: a GGUF file or a server's address; empty: nothing."""
    validation: Path | None = None
    """Rows that tell whether it should."""
    secure: bool = True
    """Whether everybody proves who they are, under TLS."""

    def check(self) -> None:
        """Find what cannot work before anything is started.

        Raises:
            ConfigError: names the file or the device.
        """
        for device, data in self.devices.items():
            if not subjects.NAME.match(device):
                raise ConfigError(f"--device {device!r}: use 1 to 64 of A-Z a-z 0-9 _ -")
            if not data.exists():
                raise ConfigError(f"--device {device}: there is no file {data}")
        if self.heldout and not self.heldout.exists():
            raise ConfigError(f"--heldout: there is no file {self.heldout}")
        if self.heldout and not self.devices:
            raise ConfigError("--heldout belongs to the first --device; name one")
        if self.serve_port is None and (self.large or self.validation):
            raise ConfigError("--large and --validation are for serving: leave out --no-serve")
        if self.validation and not self.validation.exists():
            raise ConfigError(f"--validation: there is no file {self.validation}")
        if not self.secure and self.host != HOST:
            raise ConfigError(f"--insecure lets in whoever comes: it is for --host {HOST} alone")

    def services(self, fleet: Access, authority: Authority | None, ports: "Ports") -> list[Program]:
        """The services as child processes."""

        def service(name: str, *more: str) -> Program:
            arguments = ["--servers", *fleet.servers]
            if authority is not None:
                arguments += ["--creds-file", str(authority.creds(name).resolve())]
                arguments += ["--ca-file", fleet.ca_file, "--tls-name", fleet.tls_name]
            return Program(name, f"services.{name}", [*arguments, *more])

        state = self.state_dir.resolve()
        found = [
            service("aggregator"),
            service("scheduler"),
            service("telemetry", "--host", HOST, "--port", str(ports.telemetry)),
        ]
        if authority is not None:
            files_of_it = ["--registrar-file", str(authority.registrar_file.resolve())]
            files_of_it += ["--system-creds-file", str(authority.system_creds.resolve())]
            home = ["--state-dir", str(state / "registrar")]
            found.append(service("registrar", *files_of_it, *home))
        if ports.serve is not None:
            home = ["--state-dir", str(state / "proxy")]
            where = ["--host", HOST, "--port", str(ports.serve)]
            more = ["--large", self.large] if self.large else []
            if self.validation is not None:
                more += ["--validation", str(self.validation.resolve())]
            found.append(service("proxy_inference", *where, *home, *more))
        return found

    def device(self, name: str, fleet: Access, ticket_text: str) -> Program:
        """A device as a child process; `ticket_text` is for its first start."""
        arguments = ["--servers", *fleet.servers]
        arguments += ["--device", name, "--data", str(self.devices[name].resolve())]
        arguments += ["--state-dir", str(self.home(name)), "--engine", self.engine]
        if self.heldout and name == next(iter(self.devices)):
            arguments += ["--heldout", str(self.heldout.resolve()), "--trusted", "true"]
        if self.models:
            arguments += ["--models", *(str(path.resolve()) for path in self.models)]
        environment = {TICKET: ticket_text} if ticket_text else {}
        return Program(f"device-{name}", "edge_client", arguments, environment)

    def home(self, device: str) -> Path:
        return self.state_dir.resolve() / "devices" / device


@dataclass(frozen=True, slots=True)
class Ports:
    """What the services listen on."""

    telemetry: int
    serve: int | None


async def up(plan: Plan, stop: Stop, say: Callable[[str], None]) -> None:
    """Run all of `plan` until the stop; then drain the services, and the broker last.

    Raises:
        ConfigError: something cannot run as configured; all else has been drained.
    """
    plan.check()
    async with locked(plan.state_dir, say) as held:
        check_free(plan.host, plan.port, "--port")
        check_free(HOST, plan.telemetry_port, "--telemetry-port")
        serve = plan.serve_port
        if serve is not None and find_spec(f"{PROXY}.__main__") is None:
            serve = None
        if serve is not None:
            check_free(HOST, serve, "--serve-port, or --no-serve")
        ports = Ports(
            plan.telemetry_port or free_port(), None if serve is None else serve or free_port()
        )
        await _run(plan, ports, held, stop, say)


async def _run(plan: Plan, ports: Ports, held: int, stop: Stop, say: Callable[[str], None]) -> None:
    """Broker and programs run until the stop; each inherits the descriptor `held`."""
    authority, security = None, ""
    if plan.secure:
        authority = Authority(plan.state_dir / "identity")
        names = ["localhost", HOST, outward_address()]
        await asyncio.to_thread(authority.make, hosts=names)
        security = files.read(authority.server_conf)
    handshakes = Handshakes()
    broker = BrokerProcess(
        plan.state_dir / "broker",
        host=plan.host,
        port=plan.port,
        inherits=(held,),
        security=security,
        complained=handshakes.hear,
    )
    await broker.start()
    fleet = _access(plan, broker, authority)
    fleet.save(plan.state_dir / access.FILE)
    if other := access.register(fleet):
        say(f"commands in other directories still go to the fleet at {other}")
    supervisor = Supervisor(plan.state_dir / "logs", stop, say, (held,))
    try:
        async with asyncio.TaskGroup() as tasks:
            services = plan.services(fleet, authority, ports)
            children = [tasks.create_task(supervisor.keep(program)) for program in services]

            def start(device: Program) -> None:
                if not stop.asked:
                    children.append(tasks.create_task(supervisor.keep(device)))

            attendants = [
                tasks.create_task(_keep_broker(broker, stop, say)),
                tasks.create_task(handshakes.tell(fleet)),
                tasks.create_task(_Opening(plan, fleet, ports, start, say).run()),
            ]
            await stop.wait()
            say("stopping")
            for attendant in attendants[1:]:
                attendant.cancel()
            await asyncio.wait(children)
            attendants[0].cancel()
    finally:
        await broker.stop()


def _access(plan: Plan, broker: BrokerProcess, authority: Authority | None) -> Access:
    """How this machine's user gets in, and where devices elsewhere find the broker."""
    here = HOST if plan.host == EVERYWHERE else plan.host
    fleet = Access([f"nats://{here}:{broker.port}"])
    if plan.host == EVERYWHERE:
        there = [f"nats://{outward_address()}:{broker.port}"]
        fleet = msgspec.structs.replace(fleet, invite_servers=there)
    if authority is None:
        return fleet
    return msgspec.structs.replace(
        fleet,
        creds_file=str(authority.creds("console").resolve()),
        ca_file=str(authority.ca_file.resolve()),
        tls_name=TLS_NAME,
    )


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


@dataclass(frozen=True, slots=True)
class _Opening:
    """What happens once: local devices are let in and started, and the user is told where to go."""

    plan: Plan
    fleet: Access
    ports: Ports
    start: Callable[[Program], None]
    say: Callable[[str], None]

    async def run(self) -> None:
        bus = await nats_bus.connect(
            self.fleet.servers, name="up", credentials=self.fleet.credentials()
        )
        try:
            invitation = await self._devices(bus)
            try:
                async with asyncio.timeout(READY_S):
                    await _answered(bus, subjects.JOB_LIST, ListJobs())
                    await _answered(bus, subjects.DEVICE_LIST, ListDevices())
            except TimeoutError:
                logs = self.plan.state_dir / "logs"
                self.say(f"the services are slow to start; their logs are in {logs}")
        finally:
            await bus.close()
        self._announce(invitation)

    async def _devices(self, bus: nats_bus.NatsBus) -> str:
        """The local devices are started; a ticket for those elsewhere, where they can come."""
        if not self.plan.secure:
            for name in self.plan.devices:
                self.start(self.plan.device(name, self.fleet, ""))
            return ""
        await _answered(bus, subjects.IDENTITY_LIST, ListIdentities())
        here = msgspec.structs.replace(self.fleet, invite_servers=[])
        for name in self.plan.devices:
            enrolled = (self.plan.home(name) / "identity" / access.FILE).exists()
            request = InviteDevices(device=name, expires_s=INVITED_S)
            text = "" if enrolled else await self._ticket(bus, here, request)
            self.start(self.plan.device(name, self.fleet, text))
        if self.plan.host == HOST:
            return ""
        everybody = InviteDevices(uses=0, expires_s=INVITED_S)
        return await self._ticket(bus, self.fleet, everybody)

    async def _ticket(self, bus: nats_bus.NatsBus, fleet: Access, request: InviteDevices) -> str:
        """A ticket; none, and a word to the user, if the registrar refuses to make one."""
        while True:
            try:
                return (await invited(bus, fleet, request)).text()
            except Unanswered:
                await asyncio.sleep(1.0)
            except Failure as failure:
                self.say(f"no ticket for {request.device or 'devices elsewhere'}: {failure}")
                return ""

    def _announce(self, invitation: str) -> None:
        """Say where everything is."""
        lines = [f"broker     {', '.join(self.fleet.servers)}"]
        if self.fleet.invite_servers:
            lines.append(f"devices    {', '.join(self.fleet.invite_servers)}")
        if invitation:
            lines.append(f"           seedwire-edge enroll {invitation} --device NAME")
            lines.append(f"           (any number of devices, for {INVITED_S / 3600:.0f} h)")
        telemetry = f"http://{HOST}:{self.ports.telemetry}"
        lines.append(f"page       {telemetry}/")
        lines.append(f"telemetry  {telemetry}/metrics, /jobs, /devices")
        if self.ports.serve is not None:
            lines.append(
                f"model      http://{HOST}:{self.ports.serve}/v1, once a job has published"
            )
        lines.append(f"logs       {self.plan.state_dir / 'logs'}")
        example = next(iter(self.plan.devices.values()), Path("data.jsonl"))
        lines.append("next:      seedwire devices")
        lines.append(
            "           seedwire job submit --name first --model model.gguf "
            f"--labels-from {example} --watch"
        )
        self.say("\n".join(lines))


async def _answered(bus: nats_bus.NatsBus, subject: str, question: Message) -> None:
    """Return when somebody answers on `subject`."""
    while True:
        try:
            await bus.request(subject, encode(question), timeout_s=2.0)
        except TransientError:
            await asyncio.sleep(0.2)
        else:
            return
