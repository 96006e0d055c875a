"""Settings come from a file, the environment and the command line, and say what is wrong."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from shared import config
from shared.errors import ConfigError


class Example(msgspec.Struct, frozen=True):
    """An example."""

    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    threads: int = 1
    password: str = ""
    trusted: bool = False
    engine: Literal["llama", "fake"] = "llama"
    port: Annotated[int, Meta(ge=0, le=65535, description="Its port; 100% free.")] = 80


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


def test_a_flag_alone_is_true_and_may_be_spelt_out() -> None:
    assert load("--trusted", "--threads", "2") == Example(threads=2, trusted=True)
    assert load("--trusted", "true").trusted
    assert not load("--trusted", "false", EX_TRUSTED="true").trusted
    assert load(EX_TRUSTED="1").trusted


def test_a_plain_string_is_a_list_of_one(tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text('servers = "nats://a:1"\n')
    assert load("--config", str(file)).servers == ("nats://a:1",)


def test_a_wrong_value_is_named_with_its_source_and_setting(tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text('threads = "abc"\npassword = 12345\nservers = [3]\n')

    def refusal(*argv: str, **environ: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(*argv, **environ)
        return str(caught.value)

    assert refusal(EX_THREADS="abc") == 'EX_THREADS: Expected int, got str "abc"'
    assert refusal("--threads", "abc") == '--threads: Expected int, got str "abc"'
    assert refusal("--trusted", "maybe") == '--trusted: Expected bool, got str "maybe"'
    assert refusal(EX_ENGINE="x") == 'EX_ENGINE: Expected llama or fake, got "x"'
    assert refusal("--port", "70000") == '--port: Expected int <= 65535, got "70000"'
    at = ("--config", str(file))
    assert refusal(*at) == f'{file}: threads: Expected int, got str "abc"'
    assert refusal(*at, "--threads", "1") == f"{file}: password: Expected str, got int"
    assert (
        refusal(*at, "--threads", "1", "--password", "p")
        == f"{file}: servers: Expected str, got int [3]"
    )


def test_help_explains_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("--help")
    told = " ".join(capsys.readouterr().out.split())
    assert "--port VALUE Its port; 100% free. [default: 80; EX_PORT]" in told
    assert "--trusted [true|false] [default: false; EX_TRUSTED]" in told
    assert "--engine llama|fake" in told
    assert "[default: nats://127.0.0.1:4222; EX_SERVERS]" in told
    assert "--password VALUE [EX_PASSWORD]" in told


def test_what_differs_from_its_default_is_shown_alone_if_asked() -> None:
    told = config.shown(Example(password="secret", trusted=True), changed_only=True)
    assert told == {"password": "***", "trusted": True}


def test_a_variable_that_sets_nothing_is_told_with_the_setting_it_may_have_meant() -> None:
    environ = {
        "EX_SERVER": "nats://me:secret@a:1",
        "EX_THREADS": "2",
        "EX_SERVICE_HOST": "10.0.0.1",  # from here on as Kubernetes sets them for a Service `ex`
        "EX_SERVICE_PORT": "80",
        "EX_SERVICE_PORT_HTTP": "80",
        "EX_PORT": "tcp://10.0.0.1:80",
        "EX_PORT_80_TCP_ADDR": "10.0.0.1",
        "EX_METRICS_PORT": "tcp://10.0.0.2:80",
        "OTHER_SERVER": "x",
    }
    told = config.misspelt(Example, "EX", environ)
    assert told == ["EX_SERVER sets nothing; did you mean EX_SERVERS?"]
    assert load(**environ) == Example(threads=2)
    assert load(EX_PORT="81").port == 81


def test_secrets_are_not_shown() -> None:
    settings = Example(servers=("nats://me:secret@host:4222",), password="secret")
    assert "secret" not in str(config.shown(settings))
