"""What the edge daemon decides, without clock or I/O; and what it must not load."""

import gzip
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_client.config import Settings, completed
from edge_client.history import Link
from edge_client.state import (
    RESEND_CAP_S,
    RESEND_FIRST_S,
    Fate,
    Position,
    Resends,
    Speeds,
    fate,
    snapshot_is_faster,
)
from shared.errors import ConfigError
from shared.messages import ProbeWork, UpdateKey, WorkAssigned

AT, ELSEWHERE = "a" * 64, "b" * 64


def work(round: int = 5, *, epoch: int = 0, digest: str = AT) -> WorkAssigned:
    return WorkAssigned(
        key=UpdateKey("job", epoch, round, "dev", 0),
        digest=digest,
        stream_round=round,
        work=ProbeWork("probe", [(0, 4)]),
        eps=0.01,
        batch_rows=4,
        scope=(0, 1),
        deadline_s=10.0,
    )


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (None, "wait"),
        (Position(9, 0, 4, AT), "do"),
        (Position(9, 0, 3, ELSEWHERE), "wait"),
        (Position(9, 0, 5, ELSEWHERE), "passed"),
        (Position(9, 0, 6, ELSEWHERE), "passed"),
        (Position(9, 1, 0, ELSEWHERE), "passed"),
    ],
)
def test_work_is_done_at_its_adapter_and_nowhere_else(
    position: Position | None, expected: Fate
) -> None:
    assert fate(work(), position, ()) == expected


def test_work_of_a_later_epoch_waits_and_measured_work_is_only_sent_again() -> None:
    assert fate(work(epoch=1), Position(9, 0, 6, AT), ()) == "wait"
    assert fate(work(), Position(9, 0, 4, AT), {"job.0.5.dev.0"}) == "held"


def test_resends_double_up_to_their_cap_and_hurry_after_a_reconnect() -> None:
    resends = Resends()
    resends.add("k", 0.0)
    assert resends.due(0.0) == ["k"]
    now, waits = 0.0, list[float]()
    for _ in range(9):
        resends.sent("k", now)
        wait_s = resends.next_s(now)
        assert wait_s is not None
        assert resends.due(now + wait_s - 0.1) == []
        waits.append(wait_s)
        now += wait_s
    assert waits[:3] == [RESEND_FIRST_S, 2 * RESEND_FIRST_S, 4 * RESEND_FIRST_S]
    assert waits[-1] == RESEND_CAP_S
    resends.hurry(now)
    assert resends.due(now) == ["k"]
    resends.sent("k", now)
    assert resends.next_s(now) == RESEND_FIRST_S / 4, "its stream may not have been there yet"
    resends.forget("k")
    resends.sent("k", now)
    assert resends.next_s(now) is None


def test_a_speed_is_reported_at_first_and_when_it_moves_by_a_third() -> None:
    speeds = Speeds()
    assert speeds.learn("job", "probe_s", 1.0)
    assert [speed.probe_s for speed in speeds.report()] == [1.0]
    assert not speeds.learn("job", "probe_s", 1.5)
    assert speeds.learn("job", "evaluate_s", 9.0)
    assert speeds.learn("job", "probe_s", 4.0)


def test_the_cheaper_way_to_catch_up_is_taken() -> None:
    def faster(rounds: int, snapshot_bytes: int, bytes_per_s: float = 1e6) -> bool:
        return snapshot_is_faster(
            rounds=rounds,
            round_bytes=2_000,
            apply_s=0.01,
            snapshot_bytes=snapshot_bytes,
            bytes_per_s=bytes_per_s,
        )

    assert not faster(0, 4_000)
    assert not faster(5, 4_000_000)
    assert faster(1_000, 4_000_000)
    assert faster(5, 4_000, bytes_per_s=1e3)
    assert not faster(50, 4_000_000, bytes_per_s=1e3)


def test_the_link_rate_learns_from_transfers_that_are_large_enough() -> None:
    link = Link(bytes_per_s=1e6)
    link.moved(200, 1.0)
    assert link.bytes_per_s == 1e6
    link.moved(1_000_000, 10.0)
    assert link.bytes_per_s == pytest.approx(7e5)


def test_settings_that_cannot_work_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set data, or trusted and heldout"):
        completed(Settings(device="a"))
    with pytest.raises(ConfigError, match="set trusted too"):
        completed(Settings(device="a", data=__file__, heldout=__file__))
    with pytest.raises(ConfigError, match="set heldout too"):
        completed(Settings(device="a", data=__file__, trusted=True))
    with pytest.raises(ConfigError, match="cannot be read"):
        completed(Settings(device="a", data="/nowhere/rows.jsonl"))
    with pytest.raises(ConfigError, match="rows come from a data set: hf://datasets/"):
        completed(Settings(device="a", data="hf://owner/repo/rows.jsonl"))
    assert completed(Settings(device="a", data=str(tmp_path))).data, "it may be empty still"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ConfigError, match=r"heldout: .* is empty; name a JSONL or CSV file"):
        completed(Settings(device="a", heldout=str(empty), trusted=True))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ConfigError, match="is not text; give JSONL or CSV rows"):
        completed(Settings(device="a", data=str(model)))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "t"}'))
    assert completed(Settings(device="a", data=str(packed))).data
    with pytest.raises(ConfigError, match=r"models: /nowhere/m\.gguf cannot be read; name a GGUF"):
        completed(Settings(device="a", data=__file__, models=["/nowhere/m.gguf"]))
    with pytest.raises(ConfigError, match="use 1 to 64"):
        completed(Settings(device="a.b", data=__file__))
    assert completed(Settings(data=__file__)).device
    assert Settings(data="d", heldout="h").kinds == ["probe", "walk"]
    assert Settings(data="d", heldout="h", trusted=True).kinds == ["probe", "walk", "evaluate"]


def test_every_setting_is_explained_in_one_sentence() -> None:
    for field in msgspec.structs.fields(Settings):
        (meta,) = field.type.__metadata__
        assert meta.description[-1] == ".", field.name


def test_the_daemon_is_small_and_loads_neither_numpy_nor_llama_cpp() -> None:
    program = (
        "import re, sys, edge_client.__main__\n"
        "heavy = {'numpy', 'llama_cpp', 'gguf', 'typer', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "status = open('/proc/self/status').read()\n"
        "rss_mb = int(re.search('VmHWM:[^0-9]*([0-9]+)', status)[1]) / 1024\n"
        "assert rss_mb < 60, rss_mb\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
