"""A job on its way: look into the model, build the manifest, upload, ask the aggregator."""

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.console.client import ask
from services.console.failure import Failure, Usage
from services.console.manifest import manifest
from services.console.printing import Printer
from services.console.spec import Wanted
from services.console.transfer import digest, upload
from shared import hub, subjects
from shared.bus import Link
from shared.codec import MAX_MESSAGE_BYTES, encode, encode_manifest
from shared.engine.process import EngineProcess
from shared.engine.protocol import Facts, Inspect
from shared.errors import EngineDied
from shared.messages import JobAccepted, JobsListed, ListJobs, Manifest, SubmitJob, Variant

INSPECT_S = 120.0


@dataclass(frozen=True, slots=True)
class Submission:
    """What the command line asks for."""

    job: str
    model: Path
    wanted: Wanted
    otherwise: Callable[[Facts], Wanted]
    """What is asked for where the model's last block has no closed form."""
    upload: bool = True
    url: str | None = None
    engine: Literal["llama", "fake"] = "llama"

    def check(self) -> None:
        """Find what no broker or engine is needed to refuse.

        Raises:
            Usage: says which option.
        """
        if not subjects.NAME.match(self.job):
            raise Usage(f"--name {self.job!r}: use 1 to 64 of A-Z a-z 0-9 _ -")
        if not self.model.is_file():
            raise Usage(f"--model {self.model}: there is no such file")


async def located(name: str, *, data_set: bool) -> Path:
    """Where a file lies that is named by its path or on the hub; fetched from there if need be.

    Raises:
        ConfigError, TransientError: it cannot be had from the hub.
    """
    if not hub.is_hub_name(name):
        return Path(name)
    hub.parse(name, data_set=data_set)
    return await hub.fetch_in_child(name, progress=sys.stderr.isatty())


async def submit(bus: Link, submission: Submission, printer: Printer) -> None:
    """The job is accepted, and its model in the blob store.

    Raises:
        Failure: the model cannot carry it, the upload failed, or the aggregator refused.
    """
    await ask(bus, subjects.JOB_LIST, ListJobs(), JobsListed)  # it is there, and so is the store
    facts = await inspect(submission)
    asked = submission.wanted if facts.last_block else submission.otherwise(facts)
    task = asked.spec.task
    ref = await digest(submission.model, printer.bars)
    variant = Variant(ref.digest, ref.size_bytes, submission.model.name[:200], submission.url)
    made = manifest(
        facts,
        asked.adapter,
        labels=task.labels,
        variant=variant,
        seed=secrets.randbits(63),
        momentum=asked.spec.tuning.momentum > 0,
    )
    request = SubmitJob(job=submission.job, spec=asked.spec, manifest=encode_manifest(made))
    if len(encode(request)) > MAX_MESSAGE_BYTES:
        raise Failure("the job's settings are too large: fewer allow_devices or labels")
    if submission.upload:
        await upload(bus, submission.model, printer.bars)
    accepted = await ask(bus, subjects.JOB_SUBMIT, request, JobAccepted)
    printer.result(
        {"job": accepted.job, **facts_of(facts, made, task.labels)},
        f"{described(facts, made, task.labels)}\n"
        f"job {accepted.job} accepted; see `seedwire job watch {accepted.job}`",
    )


async def inspect(submission: Submission) -> Facts:
    """What the model is, from the engine's child.

    Raises:
        EngineError: it cannot be read or is not supported.
        Failure: llama.cpp ended over it.
    """
    engine = EngineProcess(submission.engine)
    task, adapter = submission.wanted.spec.task, submission.wanted.adapter
    question = Inspect(
        str(submission.model),
        list(task.labels.values()),
        task.template,
        adapter.prompt_text if adapter.kind == "prompt" else "",
    )
    try:
        facts = await engine.ask(question, timeout_s=INSPECT_S)
    except EngineDied as error:
        mend = "it may be damaged: fetch the file again, or choose another GGUF"
        raise Failure(f"--model {submission.model}: {error}; {mend}") from error
    finally:
        await engine.close()
    if not isinstance(facts, Facts):
        raise Failure(f"the engine answered a {type(facts).__name__}")
    return facts


def facts_of(facts: Facts, made: Manifest, labels: dict[str, str]) -> dict[str, object]:
    """What will be tuned, for programs."""
    words = zip(labels.items(), facts.tokens, strict=True)
    return {
        "model": made.variants[0],
        "architecture": facts.architecture,
        "parameters": facts.parameters,
        "adapter": {
            "kinds": sorted({block.kind for block in made.blocks}),
            "blocks": len(made.blocks),
            "parameters": made.d,
        },
        "labels": {label: {"word": word, "token": token} for (label, word), token in words},
    }


def described(facts: Facts, made: Manifest, labels: dict[str, str]) -> str:
    """What will be tuned, in a few lines."""
    kinds = sorted({block.kind for block in made.blocks})
    lines = [
        f"model: {facts.architecture}, {facts.parameters:,} parameters, "
        f"{made.variants[0].size_bytes:,} bytes",
        f"adapter: {made.d:,} parameters in {len(made.blocks)} blocks ({', '.join(kinds)})",
    ]
    if labels:
        pairs = zip(labels.items(), facts.tokens, strict=True)
        words = [f"{label} as {word!r} (token {token})" for (label, word), token in pairs]
        lines.append(f"labels: {', '.join(words)}")
    return "\n".join(lines)
