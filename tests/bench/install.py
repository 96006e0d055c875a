"""What a newcomer waits for, and what a device must hold.

`install.seconds`: from `git clone` of this repository's HEAD, in a fresh virtual environment, to
the first closed round of `seedwire up` with one device and the demo's model. pip's cache is as it
is: where it holds no wheel of llama.cpp, most of it is compiling that.

`install.edge_mb`: all files of a virtual environment made without pip, after installing the extra
`edge`; what is on disk takes whole blocks (`install.edge_disk_mb`). Baseline: Flower, installed
the same way; null where it cannot be had. `install.edge_slim_mb`: after deploy/docker/slim.sh, as
the images do it: llama.cpp's wheel holds its libraries four times. MB are 2^20 bytes, as in `edge`.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.bench.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path("deploy/demo/model/seedwire-demo-q8_0.gguf")
PEER = "flwr"
UP_S, ROUND_S = 120.0, 300.0
LARGEST = 4
MB = 2**20


async def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="seedwire-install-") as folder:
        path = Path(folder)
        seconds = await _seconds_to_a_round(path)
        _install(path / "edge", f"{path / 'clone'}[edge]")
        edge = _sizes(path / "edge")
        _run(str(ROOT / "deploy" / "docker" / "slim.sh"), str(path / "edge"))
        slim, _ = _sum(_sizes(path / "edge"))
        peer = _sizes(path / "peer") if _install(path / "peer", PEER) else {}
    total, on_disk = _sum(edge)
    peer_total, peer_on_disk = _sum(peer) if peer else (None, None)
    largest = Counter({name: size for name, (size, _) in edge.items()}).most_common(LARGEST)
    return [
        Figure("install.seconds", seconds, "s"),
        Figure("install.edge_mb", total, "MiB", peer_total, target=150),
        Figure("install.edge_disk_mb", on_disk, "MiB", peer_on_disk),
        Figure("install.edge_slim_mb", slim, "MiB", total),
        *(Figure(f"install.edge_mb.{name}", size / MB, "MiB") for name, size in largest),
    ]


async def _seconds_to_a_round(path: Path) -> float:
    clone, rows = path / "clone", path / "rows.jsonl"
    rows.write_text("".join(map(_row, range(40))), encoding="utf-8")
    began = time.monotonic()
    _run("git", "clone", "--quiet", str(ROOT), str(clone))
    _run(sys.executable, "-m", "venv", str(path / "venv"))
    _run(str(path / "venv" / "bin" / "pip"), "install", "--quiet", f"{clone}[local]")
    async with _up(path, rows) as servers:
        seedwire = path / "venv" / "bin" / "seedwire"
        words = ["--name", "first", "--model", str(clone / MODEL), "--labels-from", str(rows)]
        words += ["--enough-devices", "1", "--rounds", "2", "--servers", servers]
        submitting = await _start(path, str(seedwire), "job", "submit", *words)
        output, _ = await submitting.communicate()
        if submitting.returncode:
            raise RuntimeError(f"the job was not accepted: {output.decode()}")
        watching = await _start(
            path, str(seedwire), "job", "watch", "first", "--json", "--servers", servers
        )
        try:
            async with asyncio.timeout(ROUND_S):
                await _closed(watching)
                return time.monotonic() - began
        finally:
            watching.kill()
            await watching.wait()


def _row(number: int) -> str:
    row = ("a pear and an apple", "fruit") if number % 2 else ("a saw and a drill", "tool")
    return json.dumps({"text": f"{row[0]}, number {number}", "label": row[1]}) + "\n"


async def _closed(watching: asyncio.subprocess.Process) -> None:
    """Return at the first RoundClosed that moved the adapter."""
    assert watching.stdout is not None
    said: list[str] = []
    async for line in watching.stdout:
        said.append(line.decode())
        if said[-1].startswith("{"):
            event = json.loads(said[-1])
            if event.get("type") == "RoundClosed" and event["reason"] != "abandoned":
                return
    raise RuntimeError(f"no round was closed: {''.join(said[-3:])}")


@asynccontextmanager
async def _up(path: Path, rows: Path) -> AsyncGenerator[str]:
    """`seedwire up` with one device; yields the broker's address once it is announced."""
    device = ("--device", f"till={rows}", "--port", "0", "--telemetry-port", "0")
    process = await _start(path, str(path / "venv" / "bin" / "seedwire"), "up", *device)
    try:
        yield await _announced(process)
    finally:
        process.terminate()
        await process.communicate()


async def _announced(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    said: list[str] = []
    servers = ""
    async with asyncio.timeout(UP_S):
        async for line in process.stdout:
            said.append(line.decode())
            if said[-1].startswith("broker "):
                servers = said[-1].split()[1]
            if "seedwire job submit" in said[-1]:
                return servers
    raise RuntimeError(f"seedwire up ended: {''.join(said[-5:])}")


async def _start(path: Path, *command: str) -> asyncio.subprocess.Process:
    """A process that knows of no other fleet of this user, and leaves no trace of its own."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("SEEDWIRE_")}
    return await asyncio.create_subprocess_exec(
        *command,
        cwd=path,
        env={**others, "XDG_CONFIG_HOME": str(path / "config"), "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


def _install(venv: Path, wanted: str) -> bool:
    """Whether a fresh environment holds `wanted`; only the peer may be missing."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    pip = [sys.executable, "-m", "pip", "--python", str(venv), "install", "--quiet"]
    installed = subprocess.run([*pip, wanted], capture_output=True, text=True, check=False)
    if installed.returncode and wanted != PEER:
        raise RuntimeError(installed.stderr)
    return installed.returncode == 0


def _sizes(venv: Path) -> dict[str, tuple[int, int]]:
    """Bytes and bytes on disk of each package of an environment."""
    sizes: dict[str, tuple[int, int]] = {}
    for packages in venv.glob("lib/python*/site-packages"):
        for file in packages.rglob("*"):
            if file.is_file() and not file.is_symlink():
                name = file.relative_to(packages).parts[0].removesuffix(".libs")
                size, on_disk = sizes.get(name, (0, 0))
                status = file.stat()
                sizes[name] = size + status.st_size, on_disk + 512 * status.st_blocks
    return sizes


def _sum(sizes: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """MB, and MB on disk."""
    return sum(size for size, _ in sizes.values()) / MB, sum(d for _, d in sizes.values()) / MB


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
