"""Settings come from a file, the environment and the command line, and say what is wrong."""

from pathlib import Path

import msgspec
import pytest

from shared import config
from shared.errors import ConfigError


class Example(msgspec.Struct, frozen=True):
    """An example."""

    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    threads: int = 1
    password: str = ""


def load(*argv: str, **environ: str) -> Example:
    return config.load(Example, program="example", prefix="EX", argv=argv, environ=environ)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text('servers = ["nats://a:1"]\nthreads = 2\n')
    assert load("--config", str(file)) == Example(("nats://a:1",), 2)
    assert load("--config", str(file), EX_THREADS="3").threads == 3
    assert load("--config", str(file), "--threads", "4", EX_THREADS="3").threads == 4
    assert load("--servers", "nats://b:1", "nats://c:1").servers == ("nats://b:1", "nats://c:1")
    assert load(EX_SERVERS="nats://b:1,nats://c:1").servers == ("nats://b:1", "nats://c:1")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("thread = 2", "unknown settings"),
        ('threads = "many"', "threads"),
        ("threads = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "example.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why):
        load("--config", str(file))


def test_secrets_are_not_shown() -> None:
    settings = Example(servers=("nats://me:secret@host:4222",), password="secret")
    assert "secret" not in str(config.shown(settings))
