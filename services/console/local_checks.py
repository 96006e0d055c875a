"""What doctor looks at on this machine: packages, disk, a model, a file of rows."""

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from services.console.finding import Finding, ok, problem, warning
from services.console.labels import labels_of
from services.console.manifest import OUTPUT
from shared import blobs
from shared.dataset import Dataset
from shared.engine.process import EngineProcess
from shared.engine.protocol import Facts, Inspect
from shared.errors import ConfigError, EngineError
from shared.messages import Task, Variant
from shared.runtime import project_version

INSPECT_S = 120.0
LOW_BYTES = 2 * 10**9
REFUSALS_SHOWN = 3
PACKAGES = ("nats-py", "msgspec", "typer", "rich", "numpy", "aiohttp", "llama-cpp-python")


@dataclass(frozen=True, slots=True)
class RunningJob:
    """As much of a job as a model or a file can fit or not."""

    name: str
    task: Task
    variants: tuple[Variant, ...]


def packages() -> list[Finding]:
    """Versions, and what a missing engine needs."""
    found: list[str] = []
    missing: list[str] = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    text = f"seedwire {project_version()}, {', '.join(found)}"
    if not missing:
        return [ok("packages", text)]
    mend = "pip install 'seedwire[local]'"
    tools = [name for name in ("c++", "cmake") if shutil.which(name) is None]
    if "llama-cpp-python" in missing and tools:
        mend += f"; first install {' and '.join(tools)}, by which llama.cpp is compiled"
    return [warning("packages", f"{text}; missing: {', '.join(missing)}", mend)]


def disk(state_dir: Path) -> list[Finding]:
    """Room where `seedwire up` keeps its state; nothing if it has none here."""
    if not state_dir.is_dir():
        return []
    free = shutil.disk_usage(state_dir).free
    text = f"{free / 1e9:.1f} GB free at {state_dir}"
    if free < LOW_BYTES:
        mend = "make room: the broker's store, logs and devices' models lie there"
        return [warning("disk", text, mend)]
    return [ok("disk", text)]


async def model(
    path: Path, jobs: Sequence[RunningJob], engine: Literal["llama", "fake"]
) -> list[Finding]:
    """Whether a model can be read and tuned, and whether a running job is on it."""
    child = EngineProcess(engine)
    try:
        facts = await child.ask(Inspect(str(path)), timeout_s=INSPECT_S)
    except EngineError as error:
        reason, _, mend = str(error).rpartition("; ")
        return [problem("model", reason or str(error), mend if reason else "choose another GGUF")]
    finally:
        await child.close()
    assert isinstance(facts, Facts)
    text = f"{path.name}: {facts.architecture}, {facts.parameters:,} parameters"
    found = [ok("model", text)]
    if facts.tied or OUTPUT not in facts.matrices:
        mend = "use --adapter lora or control with it"
        found.append(
            warning("model", "its output matrix is its embedding table: no output-rows", mend)
        )
    if jobs:
        digest = (await asyncio.to_thread(blobs.reference, path)).digest
        serving = [job.name for job in jobs if digest in {one.digest for one in job.variants}]
        others = sorted({one.name for job in jobs for one in job.variants})
        if serving:
            found.append(ok("model", f"is what job {', '.join(serving)} runs on"))
        else:
            text = f"no running job is on this very file; they are on {', '.join(others)}"
            found.append(warning("model", text, "devices need one of those files, to the byte"))
    return found


def data(path: Path, jobs: Sequence[RunningJob]) -> list[Finding]:
    """Which rows of a file can be used: for the running jobs, or, without any, at all."""
    wanted = [(f"for job {job.name}", job.task) for job in jobs]
    if not wanted:
        wanted = [("", _guessed(path))]
    return [finding for what, task in wanted for finding in _rows(path, task, what)]


def _rows(path: Path, task: Task, what: str) -> list[Finding]:
    purpose = f" {what}" if what else ""
    try:
        found = Dataset(str(path), task)
        found.require()
    except EngineError as error:
        mend = "rows have text and label, prompt and completion, or messages"
        return [problem("data", f"{error}{purpose}", mend)]
    text = f"{path.name}: {len(found.rows):,} usable rows{purpose}"
    if not found.refused_rows:
        return [ok("data", text)]
    shown = "; ".join(found.refused[:REFUSALS_SHOWN])
    more = ", ..." if found.refused_rows > REFUSALS_SHOWN else ""
    text = f"{text}, {found.refused_rows:,} refused: {shown}{more}"
    return [warning("data", text, "mend those rows, or do without them: the others are used")]


def _guessed(path: Path) -> Task:
    """The task that the file's rows look like: labels if it has two or more."""
    try:
        labels = labels_of(path)
    except ConfigError:
        labels = {}
    if len(labels) >= 2:
        return Task(loss="choices", labels=labels)
    return Task(loss="tokens")
