"""What a daemon makes of the identity on its disk."""

from pathlib import Path

from edge_client import identity
from edge_client.config import DEFAULT_SERVERS, Settings
from edge_client.identity import completed_by_identity


def test_an_identity_fills_in_what_is_not_said(tmp_path: Path) -> None:
    settings = Settings(device="a", data="d", state_dir=str(tmp_path))
    assert completed_by_identity(settings).servers == DEFAULT_SERVERS
    assert not identity.enrolled(tmp_path)
    mend = identity.credentials(settings).mend
    assert "no identity" in mend
    assert "seedwire-edge enroll TICKET --device a" in mend
    identity.keep(tmp_path, ["nats://h:1"], "CREDS", "CA", "seedwire")
    assert identity.enrolled(tmp_path)
    found = completed_by_identity(settings)
    home = identity.folder(tmp_path)
    assert found.servers == ("nats://h:1",)
    assert (found.creds_file, found.ca_file) == (str(home / "device.creds"), str(home / "ca.pem"))
    assert found.tls_name == "seedwire"


def test_what_is_said_wins_over_the_identity(tmp_path: Path) -> None:
    identity.keep(tmp_path, ["nats://h:1"], "CREDS", "CA", "seedwire")
    said = Settings(state_dir=str(tmp_path), servers=("nats://x:2",), token="t", ca_file="/ca")
    found = completed_by_identity(said)
    assert (found.servers, found.creds_file) == (("nats://x:2",), "")
    assert (found.ca_file, found.tls_name) == ("/ca", "")
    log_in = identity.credentials(found)
    assert (log_in.token, log_in.ca_file) == ("t", "/ca")
    assert "seedwire-edge enroll" in log_in.mend
