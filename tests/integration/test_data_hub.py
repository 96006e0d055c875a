"""Names on a model hub: the real huggingface_hub, in a child process, against a hub of our own."""

import asyncio
import json
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from deploy.demo.processes import Child
from shared import hub as names
from shared import subjects
from shared.broker import BrokerProcess
from shared.codec import decode
from shared.errors import ConfigError, TransientError
from shared.hub import HubFile, fetch_in_child, parse
from shared.messages import DeviceReport
from shared.nats_bus import connect
from tests.support import tiny_gguf
from tests.support.fleet import a_fleet
from tests.support.model_hub import COMMIT, TOKEN, Hub, a_hub
from tests.support.waiting import wait_until

pytest.importorskip("huggingface_hub", reason="names on a hub need the extra `hub`")

ROWS = "".join(json.dumps({"text": f"row {n}", "label": "ab"[n % 2]}) + "\n" for n in range(5))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Hub, None, None]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "2")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with a_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.files["datasets/acme/mail/train/rows.jsonl"] = ROWS.encode()
        yield hub


@pytest.mark.parametrize(
    ("name", "data_set", "wanted"),
    [
        ("hf://a/b/c.gguf", False, HubFile("a/b", False, "", "c.gguf")),
        ("hf://a/b.c@v1.0/d/e.gguf", False, HubFile("a/b.c", False, "v1.0", "d/e.gguf")),
        ("hf://datasets/a/b@refs%2Fpr%2F1/c.csv", True, HubFile("a/b", True, "refs/pr/1", "c.csv")),
    ],
)
def test_a_name_says_repository_revision_and_file(
    name: str, data_set: bool, wanted: HubFile
) -> None:
    assert parse(name, data_set=data_set) == wanted


@pytest.mark.parametrize(
    ("name", "data_set"),
    [
        ("hf://a/b", False),
        ("hf://a/b/", False),
        ("hf://a/b/../c", False),
        ("hf://a//c", False),
        ("hf://a/b@/c", False),
        ("hf://a/b/c.jsonl", True),
        ("hf://datasets/a/b/c.gguf", False),
        ("hf://a/b@x y/c", False),
    ],
)
def test_a_name_of_another_shape_is_refused(name: str, data_set: bool) -> None:
    with pytest.raises(ConfigError, match="hf://"):
        parse(name, data_set=data_set)


async def test_a_file_is_fetched_once_at_its_revision_and_found_again_without_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.revisions.add("v2")
    path = await fetch_in_child("hf://datasets/acme/mail@v2/train/rows.jsonl")
    assert path.read_text() == ROWS
    assert path.is_relative_to(tmp_path / "hf-home")
    assert "HEAD /datasets/acme/mail/resolve/v2/train/rows.jsonl" in hub.asked
    gets = [line for line in hub.asked if line.startswith("GET /cdn/")]
    again = await fetch_in_child(f"hf://datasets/acme/mail@{COMMIT}/train/rows.jsonl")
    assert again.read_text() == ROWS
    assert [line for line in hub.asked if line.startswith("GET /cdn/")] == gets
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert await fetch_in_child("hf://datasets/acme/mail@v2/train/rows.jsonl") == path


async def test_a_token_opens_what_is_private(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["acme/secret/m.gguf"] = b"GGUF"
    hub.private.add("acme/secret")
    with pytest.raises(ConfigError, match=r"no acme/secret, or not for you; .* set HF_TOKEN"):
        await fetch_in_child("hf://acme/secret/m.gguf")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (await fetch_in_child("hf://acme/secret/m.gguf")).read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hf://acme/none/m.gguf", "the hub has no acme/none, or not for you"),
        ("hf://datasets/acme/mail/none.csv", "datasets/acme/mail has no file none.csv"),
        ("hf://datasets/acme/mail@v9/train/rows.jsonl", "has no revision 'v9'"),
    ],
)
async def test_what_the_hub_does_not_have_is_named(hub: Hub, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        await fetch_in_child(name)


async def test_without_the_hub_or_the_package_the_error_names_the_mend(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="check the network and HF_ENDPOINT, or fetch"):
        await fetch_in_child("hf://acme/none/m.gguf")
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'seedwire\[hub\]'"):
        await fetch_in_child("hf://acme/none/m.gguf")


def peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line[:5] == "VmHWM") / 1024


async def test_a_device_fetches_its_rows_and_stays_small(
    hub: Hub, broker: BrokerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First from a hub that is not there: it says so, and comes back."""
    bus = await connect([broker.url], name="test")
    reports: list[DeviceReport] = []

    async def hear() -> None:
        async with bus.subscribe(subjects.ALL_REPORTS) as deliveries:
            async for delivery in deliveries:
                report = decode(delivery.data, DeviceReport)
                reports.append(report)

    name = "hf://datasets/acme/mail/train/rows.jsonl"
    hub.private.add("datasets/acme/mail")
    arguments = ["--device", "d", "--servers", broker.url, "--engine", "fake", "--data", name]
    arguments += ["--state-dir", str(tmp_path / "state")]
    device = Child("d", "edge_client", arguments, tmp_path / "d.log")
    hearing = asyncio.create_task(hear())
    await bus.flush()
    await device.start()
    try:
        await wait_until(lambda: any("not for you" in report.problem for report in reports))
        assert reports[-1].rows == 0
        hub.private.clear()
        await wait_until(lambda: reports[-1].rows == 5, timeout_s=40, what="it tries again")
        assert reports[-1].problem == ""
        assert device.process is not None
        assert peak_mb(device.process.pid) < 60
    finally:
        await device.stop()
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        await bus.close()


async def test_a_job_is_submitted_with_a_model_and_labels_from_the_hub(
    hub: Hub, tmp_path: Path
) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf", quantized=False)
    hub.files["acme/tiny/gguf/tiny.gguf"] = model.read_bytes()
    async with a_fleet(tmp_path, devices=0) as fleet:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.console", "job", "submit", "--name", "hub"),
            *("--model", "hf://acme/tiny/gguf/tiny.gguf", "--servers", fleet.broker.url),
            *("--labels-from", "hf://datasets/acme/mail/train/rows.jsonl", "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        said = json.loads(out)
        assert said["job"] == "hub"
        assert set(said["labels"]) == {"a", "b"}
        assert said["model"]["size_bytes"] == model.stat().st_size


def test_the_hub_s_host_is_the_package_s_business() -> None:
    assert "http" not in Path(names.__file__).read_text()
