"""Containers without a container engine: an image's command, environment and user as a process.

A container's files are a directory, its hosts and ports are this machine's. What the Dockerfile
runs to make its virtual environment is run here too, with two changes: wheels come from pip's
cache (llama.cpp takes minutes to compile), and paths are rewritten.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy.images import DEPLOY, DOCKERFILE, PREFIX, ROOT, Stage, stages

OUTSIDER = 10001
STOP_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def open_python() -> Path | None:
    """An interpreter of this version that every user may run; None if there is none."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (Path(sys.base_prefix) / "bin" / version, Path("/usr/bin") / version):
        if path.exists() and all(one.stat().st_mode & 0o001 for one in path.resolve().parents):
            return path
    return None


@contextlib.contextmanager
def open_directory() -> Generator[Path, None, None]:
    """A temporary directory that other users of this machine can enter; pytest's they cannot."""
    path = Path(tempfile.mkdtemp(prefix="seedwire-deploy-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Environments:
    """The virtual environments of the images, made when asked for, as the Dockerfile says."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stages = stages(DOCKERFILE)
        self._wheels = directory / "wheels"
        self.python = open_python()
        """What the images' `python` is here; None: this one, which only we may run."""

    def of(self, image: Stage) -> Path:
        """The virtual environment of `image`."""
        prefix = self._directory / image.environment
        if not prefix.exists():
            self._build_wheels()
            for stage in ("environment", image.environment):
                for line in self._stages[stage].runs:
                    self._run(line.replace(PREFIX, str(prefix)))
        return prefix

    def _build_wheels(self) -> None:
        """The project's wheel, and llama.cpp's as pip has it."""
        if not self._wheels.exists():
            source = self._directory / "source"
            for name in ("shared", "services", "edge_client"):
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, source / name, ignore=ignored)
            for name in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / name, source)
            self._run(f"pip wheel --no-deps --wheel-dir /wheels {source}")
            self._run(
                "pip wheel --no-deps --constraint deploy/docker/constraints.txt "
                "--wheel-dir /wheels llama-cpp-python"
            )

    def _run(self, line: str) -> None:
        line = line.replace("/wheels", str(self._wheels)).replace(" --no-cache-dir", "")
        if self.python is not None:
            line = re.sub(r"^python ", f"{self.python} ", line)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=ROOT,
            env={**os.environ, "PATH": path, "PIP_QUIET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"


@dataclass
class Container:
    """One service of compose.yaml as a process of this machine."""

    name: str
    entrypoint: Sequence[str]
    command: Sequence[str]
    healthcheck: Sequence[str]
    env: Mapping[str, str]
    directory: Path
    places: Mapping[str, str]
    """By what stands in the files: what stands for it on this machine."""
    user: str = ""
    stop_signal: str = "SIGTERM"
    process: asyncio.subprocess.Process | None = field(default=None, init=False)

    @property
    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = await self._spawn(
                [*self.entrypoint, *self.command], stdout=log, stderr=log
            )

    async def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of the entry point with other arguments."""
        arguments = tuple(_placed(word, self.places) for word in arguments)
        pipe = asyncio.subprocess.PIPE
        process = await self._spawn([*self.entrypoint, *arguments], stdout=pipe, stderr=pipe)
        output, errors = await process.communicate()
        return process.returncode or 0, (output + errors).decode()

    async def health(self, *more: str) -> tuple[int, str]:
        """Exit code and output of its health check."""
        pipe = asyncio.subprocess.PIPE
        process = await self._spawn([*self.healthcheck, *more], stdout=pipe, stderr=pipe)
        output, errors = await process.communicate()
        return process.returncode or 0, (output + errors).decode()

    async def healthy(self) -> bool:
        assert self.process is not None
        assert self.process.returncode is None, f"{self.name} ended:\n{self.log}"
        code, _ = await self.health()
        return code == 0

    async def alive(self) -> bool:
        """Whether it is not to blame for what it does not do."""
        return (await self.health("--alive"))[0] == 0

    async def stop(self) -> int | None:
        """Its exit code after its stop signal; None if it had to be killed."""
        if self.process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.Signals[self.stop_signal])
        try:
            async with asyncio.timeout(STOP_S):
                return await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            return None

    async def _spawn(self, command: Sequence[str], **streams: Any) -> asyncio.subprocess.Process:
        """The command as the image's user, where this machine lets us."""
        as_user: dict[str, Any] = {}
        if self.user and os.geteuid() == 0:
            number, _, group = self.user.partition(":")
            as_user = {"user": int(number), "group": int(group), "extra_groups": []}
        program = shutil.which(command[0], path=self.env["PATH"])
        assert program is not None, f"{command[0]} is not on {self.env['PATH']}"
        return await asyncio.create_subprocess_exec(
            *(program, *command[1:]),
            cwd=self.directory,
            env=dict(self.env),
            stdin=asyncio.subprocess.DEVNULL,
            **streams,
            **as_user,
        )


class Machine:
    """Makes containers of compose services: what a container engine would set up for them."""

    def __init__(
        self,
        directory: Path,
        environments: Environments,
        hosts: Mapping[str, str],
        secrets: Mapping[str, Any],
    ) -> None:
        self._directory = directory
        self._secrets = secrets
        self._environments = environments
        self._hosts = hosts

    def container(self, name: str, service: Mapping[str, Any], image: Stage) -> Container:
        directory = self._directory / name
        places = {**self._hosts, "0.0.0.0": "127.0.0.1"}
        if image.environment:
            places[PREFIX] = str(self._environments.of(image))
        for one in service.get("volumes", []):
            source, target = one.split(":")[:2]
            named = source.startswith((".", "/"))
            places[target] = str(self._mounted(source) if named else self._own(name, source))
        for secret in service.get("secrets", []):
            places[f"/run/secrets/{secret}"] = self._secrets[secret]["file"]
        for target in service.get("tmpfs", []):
            places[target] = str(self._own(name, "tmp"))
        places.setdefault("/var/lib/seedwire", str(self._own(name, "state")))
        places["$PATH"] = "/usr/local/bin:/usr/bin:/bin"
        env = {**image.env, **service.get("environment", {})}
        env = {key: _placed(value, places) for key, value in env.items()}
        env |= {key: str(free_port()) for key in env if key.endswith("_PORT")}
        command = service.get("command", image.command)
        return Container(
            name,
            [_placed(word, places) for word in image.entrypoint],
            [_placed(word, places) for word in command],
            image.healthcheck,
            env,
            directory,
            places,
            image.user if self._environments.python else "",
            image.stop_signal,
        )

    def _mounted(self, source: str) -> Path:
        """What is mounted: of the repository a copy, which every user may read."""
        if source.startswith("/"):
            return Path(source)
        path = self._directory / "mounted" / Path(source).name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            mounted = DEPLOY / source
            (shutil.copytree if mounted.is_dir() else shutil.copy)(mounted, path)
        return path

    def _own(self, name: str, part: str) -> Path:
        """A directory of this container alone, which its user may write to."""
        path = self._directory / name / part
        path.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(path, OUTSIDER, OUTSIDER)
        return path


def _placed(text: str, places: Mapping[str, str]) -> str:
    """`text` with each path, host and variable as it is on this machine."""
    if not places:
        return text
    keys = sorted(places, key=len, reverse=True)
    whole = (rf"(?<![^:,=]){re.escape(key)}(?=[/:,]|$)" for key in keys if key.startswith("/"))
    words = (re.escape(key) for key in keys if not key.startswith("/"))
    return re.sub("|".join((*whole, *words)), lambda found: places[found[0]], text)
