"""How a command finds its fleet, and what it says of durations."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.console import access
from services.console.__main__ import app
from services.console.durations import seconds
from services.console.failure import Usage
from services.console.handshakes import Handshakes
from shared.errors import ConfigError
from shared.identity.access import Access


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and an empty directory to stand in."""
    for name in ("SEEDWIRE_FLEET", "SEEDWIRE_SERVERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(access, "given", access.Given())
    return tmp_path


def test_a_command_goes_to_the_nearest_fleet(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert access.default_servers() == "nats://127.0.0.1:4222"
    Access(["nats://last:1"], "/last.creds").save(access.registered())
    assert access.default_servers() == "nats://last:1"
    Access(["nats://here:2"], "/here.creds").save(Path("seedwire-state/access.toml"))
    assert access.default_servers() == "nats://here:2"
    named = user / "named.toml"
    Access(["nats://named:3"], "/named.creds").save(named)
    monkeypatch.setenv("SEEDWIRE_FLEET", str(named))
    assert access.default_servers() == "nats://named:3"
    assert access.resolved(["nats://by-another-way:9"]).creds_file == "/named.creds"


def test_credentials_go_to_their_own_broker_alone(user: Path) -> None:
    fleet = Access(["nats://127.0.0.1:7"], "/f.creds", "/ca.pem", "seedwire")
    fleet.save(access.registered())
    for server in ("nats://localhost:7", "tls://127.0.0.1:7", "127.0.0.1:7"):
        assert access.resolved([server]).creds_file == "/f.creds"
    for server in ("nats://127.0.0.1:8", "nats://elsewhere:7", "nats://["):
        assert access.resolved([server]) == Access([server])
    access.given.ca = "/other.pem"
    found = access.resolved(["nats://127.0.0.1:7"])
    assert (found.creds_file, found.ca_file) == ("", "/other.pem")


def test_a_broken_access_file_is_named_when_a_command_connects(user: Path) -> None:
    access.registered().parent.mkdir(parents=True)
    access.registered().write_text("servers = 3\n")
    assert access.default_servers() == "nats://127.0.0.1:4222"
    with pytest.raises(ConfigError, match=r"fleet\.toml"):
        access.resolved(["nats://127.0.0.1:4222"])


def test_durations_are_read_as_people_write_them() -> None:
    assert [seconds(text, "-") for text in ("90s", "30m", "24h", "1.5d")] == [
        90.0,
        1800.0,
        86400.0,
        129600.0,
    ]
    with pytest.raises(Usage, match="--expires 'soon': write 90s"):
        seconds("soon", "--expires")


def test_keys_are_made_by_a_command_and_not_twice(user: Path) -> None:
    said = [
        CliRunner().invoke(app, ["keys", "init", str(user / "keys"), "--json"]) for _ in range(2)
    ]
    assert [one.exit_code for one in said] == [0, 0], said
    assert [json.loads(one.stdout)["made"] for one in said] == [True, False]
    assert (user / "keys" / "creds" / "aggregator.creds").exists()


@pytest.mark.parametrize(
    ("line", "code", "why"),
    [
        ("up --insecure --host 0.0.0.0", 78, "--insecure lets in whoever comes"),
        ("device invite --expires soon", 2, "write 90s, 30m, 24h or 7d"),
        ("device invite --expires 400d", 2, "from 1s to 366d"),
        ("device invite --device a.b", 2, "is no device's name"),
        ("device revoke a.b", 2, "is no device's name"),
        ("device list --servers nats://127.0.0.1:1", 69, "no broker lets us in"),
    ],
)
def test_a_command_that_cannot_be_says_why(user: Path, line: str, code: int, why: str) -> None:
    said = CliRunner().invoke(app, line.split())
    assert (said.exit_code, why in said.stderr) == (code, True), said.output


def test_a_failed_handshake_is_told_of_and_a_look_at_the_port_is_not() -> None:
    handshakes = Handshakes()
    line = "[7] 2026/01/01 00:00:00.1 [ERR] 192.0.2.7:49612 - cid:9 - TLS handshake error: "
    handshakes.hear(
        line + "read tcp 192.0.2.1:4222->192.0.2.7:49612: read: connection reset by peer"
    )
    assert not handshakes.waiting
    handshakes.hear(line + "tls: first record does not look like a TLS handshake\n")
    assert handshakes.waiting == 1
