"""`python -m services.distiller`: one distillation, from a job that waits to its next epoch."""

import asyncio
import json
import sys
from pathlib import Path

import msgspec

from services.distiller.config import Settings
from services.distiller.waiting import open_epoch, waiting
from shared import config, logs, nats_bus
from shared.errors import ConfigError, SeedwireError
from shared.messages import Distilled
from shared.runtime import EXIT_CONFIG

NAME = "distiller"
PATIENCE_S = 10.0
EXIT_FAILURE = 1


class Opened(msgspec.Struct):
    """What is printed at the end; its keys are a promise to scripts."""

    job: str
    epoch: int
    """Counted from 0, as in the log."""
    distilled: Distilled
    forced: str = ""
    """What spoke against it."""


class Failure(SeedwireError):
    """The epoch was not opened; the text says why and what to change."""


def main(arguments: list[str]) -> int:
    """Run it; the exit code: 0 the epoch is open, 1 it is not, 78 a setting is wrong."""
    as_json = "--json" in arguments
    try:
        settings = config.load(
            Settings, program=f"seedwire-{NAME}", prefix="SEEDWIRE_DISTILLER", argv=arguments
        )
        logs.configure(NAME, level=settings.log_level)
        _check(settings)
        opened = asyncio.run(run(settings))
    except ConfigError as error:
        return _told(error, EXIT_CONFIG, as_json=as_json)
    except SeedwireError as error:
        return _told(error, EXIT_FAILURE, as_json=as_json)
    except OSError as error:
        failure = Failure(f"{error.filename}: {error.strerror}; --cache says where answers lie")
        return _told(failure, EXIT_FAILURE, as_json=as_json)
    sys.stdout.write(_result(opened, as_json=settings.json) + "\n")
    return 0


async def run(settings: Settings) -> Opened:
    """Distil, and open the job's next epoch with what came of it.

    Raises:
        SeedwireError: it cannot be done, or should not; says why.
        OSError: the cache cannot be written.
    """
    bus = await nats_bus.connect(
        list(settings.servers),
        name=NAME,
        credentials=settings.credentials,
        patience_s=PATIENCE_S,
    )
    try:
        job = await waiting(bus, settings.job)
        try:
            from services.distiller import working  # torch takes seconds to load
        except ImportError as error:
            raise ConfigError(
                f"{error.name} is not installed; distillation needs the extra `distil`: "
                "pip install 'seedwire[distil]'"
            ) from error
        made = await asyncio.to_thread(working.work, job, settings, _say)
        obstacle = working.obstacle(made)
        if obstacle is not None and not settings.force:
            raise Failure(str(obstacle))
        epoch = await open_epoch(bus, job, made.start, made.anchor, made.figures)
    finally:
        await bus.close()
    return Opened(settings.job, epoch, made.figures, "" if obstacle is None else obstacle.why)


def _check(settings: Settings) -> None:
    for name in ("job", "small", "large", "public"):
        if not getattr(settings, name):
            raise ConfigError(f"--{name} is missing")
    for name in ("large", "public", "heldout"):
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            raise ConfigError(f"--{name} {path}: there is no such file")
    if not Path(settings.small).is_dir():
        raise ConfigError(f"--small {settings.small}: there is no such folder")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _told(error: Exception, code: int, *, as_json: bool) -> int:
    _say(json.dumps({"error": str(error), "code": code}) if as_json else f"error: {error}")
    return code


def _result(opened: Opened, *, as_json: bool) -> str:
    if as_json:
        return msgspec.json.encode(opened).decode()
    made = opened.distilled
    rows = [
        ("small model, held-out loss", made.held_out_loss_before, made.held_out_loss_after),
        ("small model, accuracy", made.accuracy_before, made.accuracy_after),
        ("ensemble, held-out loss", made.ensemble_loss_before, made.ensemble_loss_after),
        ("ensemble's entropy", made.teacher_entropy_before, made.teacher_entropy_after),
        ("divergence from its teacher", made.kl_before, made.kl_after),
    ]
    lines = [f"job {opened.job} goes on in epoch {opened.epoch + 1}"]
    lines += [f"{name}: {_figure(old)} -> {_figure(new)}" for name, old, new in rows]
    if opened.forced:
        lines.append(f"forced, although {opened.forced}")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
