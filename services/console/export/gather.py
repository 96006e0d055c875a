"""From a job's name to its adapter: the log, a snapshot or the commits, the base model's header."""

import asyncio
import tempfile
from contextlib import aclosing
from pathlib import Path

from services.console.export.history import History
from services.console.export.tuned import Base, Tuned
from services.console.failure import Failure
from services.console.printing import Printer
from services.console.transfer import digest
from shared import blobs, subjects
from shared.adapter import Adapter
from shared.bus import Streams
from shared.engine.fitting import ARCHITECTURES, check_fit
from shared.engine.gguf_file import Header, read_header
from shared.errors import EngineError
from shared.log import read
from shared.messages import EpochOpened, LogEvent, Manifest, Variant

FIRST_CHUNKS = 4
"""Of a model's file are read first; twice as many each time that its header goes on."""


async def gather(
    streams: Streams,
    job: str,
    *,
    round: int | None,
    model: Path | None,
    base_name: str | None,
    printer: Printer,
) -> Tuned:
    """The adapter of `job` after `round`, or else its best or newest published one, and its base.

    Raises:
        Failure: there is no such job or round, or `model` is not the job's.
        EngineError: the model's file cannot be read, or does not fit the manifest.
        TransientError: the broker does not answer.
    """
    history = await history_of(streams, job)
    spec, epoch = history.opened()
    adapter = Adapter(epoch.manifest)
    if adapter.manifest.architecture not in ARCHITECTURES:
        raise Failure(
            f"job {job} tunes a model of architecture {adapter.manifest.architecture}, which no "
            f"other program loads; export knows {', '.join(ARCHITECTURES)}"
        )
    chosen = history.round_to_export(round)
    variant, header = await base_of(streams, adapter.manifest, model, printer)
    tuned = Tuned(
        job,
        spec,
        await adapter_at(streams, history, chosen, printer),
        Base(variant, header, base_name),
        history,
    )
    check_fit(variant.name, header, tuned.blocks, 0)
    return tuned


async def history_of(streams: Streams, job: str) -> History:
    """What the log says of `job` now."""
    history = History(job)
    async with aclosing(read(streams, subjects.LOG_STREAM, subjects.log(job))) as events:
        async for _, event in events:
            if isinstance(event, LogEvent):
                history.evolve(event)
    return history


async def start_of(streams: Streams, epoch: EpochOpened) -> Adapter:
    """The adapter that an epoch starts with.

    Raises:
        TransientError: its bytes are not to be had.
    """
    if epoch.start is None:
        return Adapter(epoch.manifest)
    return Adapter.from_bytes(epoch.manifest, await blobs.load(streams, epoch.start))


async def adapter_at(streams: Streams, history: History, round: int, printer: Printer) -> Adapter:
    """The adapter after `round`: from the newest snapshot before it, and the commits from there.

    Raises:
        Failure: the log's commits do not lead to the log's digest.
    """
    _, epoch = history.opened()
    adapter = await start_of(streams, epoch)
    for published in sorted(history.published, reverse=True):
        if published > round:
            continue
        try:
            data = await blobs.load(streams, history.published[published].snapshot)
        except blobs.NotStored:  # only some are kept
            continue
        adapter = Adapter.from_bytes(epoch.manifest, data)
        break
    closes = [closed for closed in history.until(round) if closed.round > adapter.round]
    if closes:
        printer.remark(f"replaying rounds {closes[0].round} to {closes[-1].round} from the log")
    for closed in closes:
        await asyncio.to_thread(adapter.apply, closed.round, closed.commit)
    wanted = history.until(round)[-1].digest
    if adapter.digest() != wanted:
        raise Failure(
            f"round {round} of job {history.job} comes out as {adapter.digest()}, the log says "
            f"{wanted}: another version of Seedwire wrote this log; export with that one"
        )
    return adapter


async def base_of(
    streams: Streams, manifest: Manifest, model: Path | None, printer: Printer
) -> tuple[Variant, Header]:
    """The header of the job's model: of the file `model`, or as the fleet's store has it.

    Raises:
        Failure: `model` is not the job's, or the store does not have it.
    """
    if model is not None:
        ref = await digest(model, printer.people)
        for variant in manifest.variants:
            if variant.digest == ref.digest:
                return variant, read_header(str(model))
        raise Failure(
            f"--model {model} has SHA-256 {ref.digest}, the job's model is "
            f"{manifest.variants[0].name} with {manifest.variants[0].digest}: name that file"
        )
    for variant in manifest.variants:
        header = await _stored_header(streams, variant)
        if header is not None:
            return variant, header
    raise Failure(
        f"the fleet's store does not have the job's model {manifest.variants[0].name}: name the "
        "file with --model"
    )


async def _stored_header(streams: Streams, variant: Variant) -> Header | None:
    """The header of a model in the store, of which no more is fetched than that; None: not there.

    Raises:
        EngineError: what is there is no GGUF file.
    """
    chunks = -(-variant.size_bytes // blobs.CHUNK_BYTES)
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        wanted, got = FIRST_CHUNKS, 0
        while True:
            for index in range(got, min(wanted, chunks)):
                subject = subjects.blob(variant.digest, index)
                stored = await streams.get_last(subjects.BLOBS_STREAM, subject)
                if stored is None:
                    return None
                file.write(stored.data)
            got = min(wanted, chunks)
            file.flush()
            try:
                return read_header(file.name, whole=False)
            except EngineError as error:
                if got == chunks or not _begins_gguf(file.name):
                    raise EngineError(str(error).replace(file.name, variant.name)) from error
            wanted *= 2


def _begins_gguf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
