"""Updates of a crowd of devices, made beforehand: each of one part, 32 probes, sums at random."""

from collections.abc import Iterator

import numpy as np

from shared import subjects
from shared.codec import encode
from shared.messages import ProbeResult, RoundOpened, SubmitUpdate, UpdateKey

PROBES, DIRECTIONS = 32, 512


def updates_of(opened: RoundOpened, numbers: range) -> Iterator[tuple[str, bytes]]:
    """The subject and the bytes of each device's update of the round, alike for alike numbers."""
    chance = np.random.default_rng(numbers.start)
    for number in numbers:
        device = f"device-{number:06}"
        differences = chance.integers(-50_000, 50_000, PROBES).astype("<i4").tobytes()
        result = ProbeResult(
            how="probe",
            ranges=[(number * PROBES % DIRECTIONS, PROBES)],
            differences=differences,
            bends=differences,
            loss=4 << 20,
            weight=4,
        )
        key = UpdateKey(opened.job, opened.epoch, opened.round, device, 0)
        update = SubmitUpdate(key=key, digest=opened.digest, result=result, work_s=1.0)
        yield subjects.update(opened.job, device), encode(update)
