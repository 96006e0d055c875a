"""Facts and reports for tests of whoever reads them: usual ones, but for what a test names."""

from typing import Any

from msgspec.structs import replace

from shared.messages import DeviceReport, RoundClosed, RoundOpened

DIGEST = "d" * 64


def round_opened(number: int, **different: Any) -> RoundOpened:
    usual = RoundOpened(
        job="demo",
        epoch=0,
        round=number,
        stream_round=number,
        kind="tune",
        how="probe",
        directions=8,
        eps=0.01,
        batch_rows=4,
        scope=(0, 1),
        digest=DIGEST,
        evaluate=False,
        enough_devices=3,
        enough_probes=24,
        over_selection=1.0,
        deadline_s=10.0,
    )
    return replace(usual, **different)


def round_closed(number: int, **different: Any) -> RoundClosed:
    usual = RoundClosed(
        job="demo",
        epoch=0,
        round=number,
        reason="enough",
        commit=None,
        digest=DIGEST,
        detail_sequence=number,
        updates=3,
        devices=3,
        probes=24,
        weight=6,
        loss=1.0,
    )
    return replace(usual, **different)


def device_report(device: str, **different: Any) -> DeviceReport:
    usual = DeviceReport(
        device=device,
        version="0",
        cores=2,
        memory_mb=512,
        rows=10,
        heldout_rows=0,
        trusted=False,
        models=[],
    )
    return replace(usual, **different)
