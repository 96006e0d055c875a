"""The images' exact commands, started as compose.yaml does, in environments the Dockerfile makes.

What a container engine would do is done by processes here: another user, the image's variables and
compose's, its volumes as directories; hosts and ports are this machine's. The broker is a real
nats-server on compose's own configuration.
"""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.broker import BrokerProcess, find_binary
from shared.runtime import EXIT_CONFIG
from tests.deploy.containers import (
    OUTSIDER,
    Container,
    Environments,
    Machine,
    free_port,
    open_directory,
)
from tests.deploy.images import DEPLOY, PREFIX, Stage, compose, images, in_order
from tests.deploy.listener import Listener
from tests.support.waiting import wait_until

IDENTITY = "compose.identity.yaml"
HEALTHY_S = 90.0
JOB_S = 240.0

pytestmark = [
    # The first makes the environments; where pip has no wheel of llama.cpp, that too.
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="images are Linux's"),
]


@pytest.fixture(scope="module")
def environments() -> Generator[Environments, None, None]:
    with open_directory() as directory:
        yield Environments(directory)


@pytest.fixture
def directory() -> Generator[Path, None, None]:
    with open_directory() as path:
        yield path


@asynccontextmanager
async def started(container: Container) -> AsyncGenerator[Container, None]:
    """It runs while this is open."""
    await container.start()
    try:
        yield container
    finally:
        if container.process is not None and container.process.returncode is None:
            container.process.kill()
            await container.process.wait()


class Stack:
    """compose's services on this machine, each started when those it needs are healthy."""

    def __init__(
        self,
        directory: Path,
        environments: Environments,
        *overrides: str,
        **variables: str,
    ) -> None:
        self.file = compose(*overrides, variables=variables)
        self.containers: dict[str, Container] = {}
        self._directory = directory
        self._images = images()
        self.hosts = {f":{port}": f":{free_port()}" for port in (4222, 8222)}
        addresses = {
            f"{scheme}://nats:4222": f"{scheme}://127.0.0.1{self.hosts[':4222']}"
            for scheme in ("nats", "tls")
        }
        secrets = self.file.get("secrets", {})
        self._machine = Machine(directory, environments, {**addresses, **self.hosts}, secrets)

    def again(self, *overrides: str, **variables: str) -> None:
        """What is started from now on sees these variables."""
        self.file = compose(*overrides, variables=variables)

    def container(self, service: str) -> Container:
        if service not in self.containers:
            settings = self.file["services"][service]
            if service == "nats":
                made = self._broker(settings)
            else:
                image = settings["image"].removeprefix("seedwire/")
                made = self._machine.container(service, settings, self._images[image])
            self.containers[service] = made
        return self.containers[service]

    def _broker(self, settings: dict[str, Any]) -> Container:
        """The official image runs nats-server with compose's words; its files are rewritten."""
        path = {"PATH": f"{find_binary().parent}:$PATH"}
        binary = Stage("nats", path, ("nats-server",), stop_signal="SIGTERM")
        container = self._machine.container("nats", settings, binary)
        test = settings["healthcheck"]["test"][1:]
        container.healthcheck = [word.replace(":8222", self.hosts[":8222"]) for word in test]
        etc = self._directory / "nats" / "etc"
        here = {**self.hosts, "0.0.0.0": "127.0.0.1", "/etc/nats": str(etc)}
        here['"/data"'] = f'"{container.places["/data"]}"'
        for target, source in container.places.items():
            if target.startswith("/etc/nats/") and Path(source).exists():
                copy = etc / Path(target).relative_to("/etc/nats")
                copy.parent.mkdir(parents=True, exist_ok=True)
                if Path(source).is_dir():
                    copy.symlink_to(source)
                else:
                    text = Path(source).read_text(encoding="utf-8")
                    for word, placed in here.items():
                        text = text.replace(word, placed)
                    copy.write_text(text, encoding="utf-8")
        config = Path(settings["command"][-1]).relative_to("/etc/nats")
        container.command = [*settings["command"][:-1], str(etc / config)]
        return container

    async def up(self, services: list[str], within: AsyncExitStack) -> None:
        """These services and those they need are healthy."""
        known = self.file["services"]
        for name in in_order({name: known[name] for name in in_order(known)}):
            needed = {one for service in services for one in (service, *_needs(known, service))}
            if name in needed and name not in self.containers:
                container = await within.enter_async_context(started(self.container(name)))
                await wait_until(container.healthy, timeout_s=HEALTHY_S, what=f"{name} is healthy")


def _needs(known: dict[str, Any], service: str) -> set[str]:
    """All that a service depends on."""
    direct = set(known[service].get("depends_on", {}))
    return direct.union(*(_needs(known, one) for one in direct))


def commands_in_the_header(name: str) -> list[list[str]]:
    """The console's commands that a compose file's first lines tell the reader to run."""
    lines = (DEPLOY / name).read_text(encoding="utf-8").split("\n\n")[0]
    text = re.sub(r"\\\n#\s*", "", lines)
    return [shlex.split(line) for line in re.findall(r"run --rm console (.*)", text)]


def user_of(container: Container) -> int:
    """Whom its process runs as."""
    assert container.process is not None
    return Path(f"/proc/{container.process.pid}").stat().st_uid


@contextlib.contextmanager
def stopped(container: Container) -> Generator[None, None, None]:
    """It hangs while this is open."""
    assert container.process is not None
    container.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        container.process.send_signal(signal.SIGCONT)


async def test_the_stack_of_compose_comes_up_healthy_tunes_a_model_and_drains(
    directory: Path, environments: Environments
) -> None:
    stack = Stack(directory, environments)
    async with AsyncExitStack() as within:
        await stack.up(["telemetry", "scheduler", "till-1", "till-2"], within)
        for name in ("aggregator", "till-1") if environments.python and os.geteuid() == 0 else ():
            assert user_of(stack.containers[name]) == OUTSIDER

        submit, watch = commands_in_the_header("compose.yaml")
        console = stack.container("console")
        code, output = await console.run(*submit, "--rounds", "3")
        assert code == 0, output
        async with asyncio.timeout(JOB_S):
            code, output = await console.run(*watch)
        assert code == 0, output
        code, output = await console.run("job", "list")
        assert (code, "ended (finished)" in output) == (0, True), output
        await stack.up(["proxy-inference"], within)  # healthy: it serves what was published

        for name in [name for name in reversed(stack.containers) if name != "console"]:
            assert await stack.containers[name].stop() == 0, stack.containers[name].log


async def test_a_health_check_tells_a_service_that_hangs_and_does_not_blame_it_for_its_broker(
    directory: Path, environments: Environments
) -> None:
    stack = Stack(directory, environments)
    async with AsyncExitStack() as within:
        services = ["aggregator", "scheduler", "telemetry", "till-2"]
        await stack.up(services, within)
        for name in services:
            await wait_until(stack.containers[name].alive, timeout_s=HEALTHY_S, what=name)
        for name in ("aggregator", "scheduler", "telemetry"):  # of the edge: test_supervision
            container = stack.containers[name]
            with stopped(container):
                (ready, _), (alive, why) = await asyncio.gather(
                    container.health(), container.health("--alive")
                )
            assert (ready, alive) == (1, 1), why
            await wait_until(container.healthy, timeout_s=HEALTHY_S)

        await stack.containers["nats"].stop()
        for name in services:
            container = stack.containers[name]

            async def is_unready(container: Container = container) -> bool:
                return (await container.health())[0] == 1

            await wait_until(is_unready, timeout_s=HEALTHY_S, what=f"{name} is not ready")
            await wait_until(container.alive, timeout_s=HEALTHY_S, what=f"{name} is not to blame")


async def test_with_identities_only_who_was_invited_comes_in(
    directory: Path, environments: Environments
) -> None:
    keys = directory / "keys"
    keys.mkdir()
    if environments.python and os.geteuid() == 0:
        os.chown(keys, OUTSIDER, OUTSIDER)
    stack = Stack(directory, environments, IDENTITY, SEEDWIRE_KEYS=str(keys))
    make = stack.file["services"]["keys"]["command"]
    code, output = await stack.container("keys").run(*make)
    assert code == 0, output
    async with AsyncExitStack() as within:
        await stack.up(["registrar", "aggregator", "scheduler", "telemetry"], within)

        uninvited = await within.enter_async_context(started(stack.container("till-2")))
        code, output = await stack.container("console").run(*_invitation(), "--json")
        assert code == 0, output
        ticket = json.loads(output)["ticket"]
        stack.again(IDENTITY, SEEDWIRE_KEYS=str(keys), SEEDWIRE_TICKET=ticket)
        await stack.up(["till-1"], within)
        code, output = await stack.container("console").run("devices")
        assert (code, "till-1" in output, "till-2" in output) == (0, True, False), output
        assert not await uninvited.healthy()
        assert await stack.containers["till-1"].stop() == 0
        assert await stack.containers["registrar"].stop() == 0


def _invitation() -> list[str]:
    """The command by which compose.identity.yaml says a ticket is made."""
    (command,) = commands_in_the_header(IDENTITY)
    return command


def exec_start(unit: Path) -> list[str]:
    """The words of a unit's ExecStart, as systemd splits them."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(line)


async def test_the_units_command_runs_as_systemd_would_run_it(
    directory: Path, environments: Environments, broker: BrokerProcess
) -> None:
    """A user of its own, its state directory, the socket and the watchdog: nothing else."""
    state, etc = directory / "state", directory / "etc"
    for path in (state, etc):
        path.mkdir()
    rows = shutil.copy(DEPLOY / "sample" / "till-1.jsonl", etc)
    config = etc / "edge.toml"
    config.write_text(f'device = "till-7"\nservers = ["{broker.url}"]\ndata = "{rows}"\n')
    listener = Listener(str(directory / "notify"))
    if environments.python and os.geteuid() == 0:
        os.chown(state, OUTSIDER, OUTSIDER)
        os.chmod(listener.address, 0o666)  # systemd's is open to everybody
    prefix = str(environments.of(images()["edge"]))
    env = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "STATE_DIRECTORY": str(state),
        "NOTIFY_SOCKET": listener.address,
        "WATCHDOG_USEC": "900000",
    }
    places = {"${STATE_DIRECTORY}": str(state), "/etc/seedwire/edge.toml": str(config)}
    unit = DEPLOY / "systemd" / "seedwire-edge.service"
    words = [places.get(word, word.replace(PREFIX, prefix)) for word in exec_start(unit)]
    container = Container("edge", words, (), (), env, directory, {}, images()["edge"].user)
    if not environments.python:
        container.user = ""
    async with started(container):
        await wait_until(lambda: listener.said("READY=1"), timeout_s=HEALTHY_S, what=container.log)
        await wait_until(lambda: listener.said("STATUS=connected"), timeout_s=HEALTHY_S)
        listener.listen()
        await asyncio.sleep(0.9)
        assert listener.listen() >= 2
        assert (state / "spool").is_dir()
        assert await container.stop() == 0
        assert listener.said("STOPPING=1")
    listener.close()


async def test_a_unit_whose_setting_is_wrong_ends_with_the_code_that_restarts_nothing(
    directory: Path, environments: Environments
) -> None:
    unit = DEPLOY / "systemd" / "seedwire-edge.service"
    assert f"RestartPreventExitStatus={EXIT_CONFIG}\n" in unit.read_text(encoding="utf-8")
    prefix = str(environments.of(images()["edge"]))
    places = {"${STATE_DIRECTORY}": str(directory / "state")}
    words = [places.get(word, word.replace(PREFIX, prefix)) for word in exec_start(unit)]
    env = {"PATH": "/usr/bin:/bin"}  # and there is no /etc/seedwire/edge.toml
    code, output = await Container("edge", words, (), (), env, directory, {}).run(*words[1:])
    assert (code, "/etc/seedwire/edge.toml" in output) == (EXIT_CONFIG, True), output


async def test_the_operators_unit_brings_everything_up(
    directory: Path, environments: Environments
) -> None:
    """`seedwire up` as a unit: it announces its services, and drains at SIGTERM."""
    state = directory / "state"
    state.mkdir()
    if environments.python and os.geteuid() == 0:
        os.chown(state, OUTSIDER, OUTSIDER)
    unit = DEPLOY / "systemd" / "seedwire.service"
    prefix = str(environments.of(images()["console"]))
    places = {"${STATE_DIRECTORY}": str(state), "${SEEDWIRE_HOST}": "127.0.0.1"}
    words = [places.get(word, word.replace(PREFIX, prefix)) for word in exec_start(unit)]
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONUNBUFFERED": "1", "HOME": "/"}
    ports = ("--port", "0", "--telemetry-port", "0", "--serve-port", "0")
    user = images()["console"].user if environments.python else ""
    container = Container("up", words, ports, (), env, directory, {}, user)
    async with started(container):
        await wait_until(
            lambda: "seedwire job submit" in container.log, timeout_s=HEALTHY_S, what="it is up"
        )
        assert await container.stop() == 0, container.log
