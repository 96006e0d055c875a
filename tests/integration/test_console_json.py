"""The console as scripts use it: its own process, JSON on stdout, against a real fleet."""

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.demo.processes import ROOT
from tests.support.fleet import Fleet, a_fleet

JOB = {
    "job", "status", "reason", "epoch", "round", "rounds", "digest", "accuracy", "loss", "epochs"
}  # fmt: skip
DEVICE = {
    "device", "seen_s_ago", "away", "job", "doing", "rows", "tokens_per_s", "rounds", "reward",
    "problem", "rows_refused",
}  # fmt: skip
SUBMITTED = {"job", "model", "architecture", "parameters", "adapter", "labels"}
"""The keys that scripts may rely on."""


@dataclass(frozen=True)
class Ran:
    """What came of one command."""

    code: int
    lines: list[dict[str, Any]]
    error: str


async def seedwire(*arguments: str) -> Ran:
    """Run the console with --json; whatever is not JSON on its stdout fails the test."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.console", *arguments, "--json"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(90):
        out, err = await process.communicate()
    lines = [json.loads(line) for line in out.decode().splitlines()]
    assert process.returncode is not None
    return Ran(process.returncode, lines, err.decode())


def submission(fleet: Fleet, name: str, rounds: int) -> list[str]:
    """The command that starts a job on the fake engine."""
    options = f"--name {name} --model {fleet.model} --labels fruit=apple,metal=iron --engine fake"
    numbers = f"--rounds {rounds} --enough-devices 2 --directions 64 --deadline 5"
    return ["job", "submit", *options.split(), *numbers.split(), "--evaluate-every", "1"]


async def test_every_command_prints_the_keys_that_are_promised(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=2) as fleet:
        at = ("--servers", fleet.broker.url)
        submitted = await seedwire(*submission(fleet, "demo", 3), *at, "--watch")
        assert (submitted.code, submitted.error) == (0, "")
        first, *facts = submitted.lines
        assert first.keys() == SUBMITTED
        assert first["labels"]["fruit"].keys() == {"word", "token"}
        assert first["adapter"].keys() == {"kinds", "blocks", "parameters"}
        assert [facts[0]["type"], facts[-1]["type"]] == ["JobOpened", "JobEnded"]
        assert (await seedwire("job", "watch", "demo", *at)).lines == facts

        line = f"{sys.executable} -m services.console job watch demo --json --servers {at[1]}"
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", f"{line} | head -n 1"),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert (json.loads(out), err) == (facts[0], b"")  # a reader may stop reading

        (listed,) = (await seedwire("job", "list", *at)).lines
        assert [job.keys() for job in listed["jobs"]] == [JOB]
        assert 0.0 <= listed["jobs"][0]["accuracy"] <= 1.0

        (devices,) = (await seedwire("devices", *at)).lines
        assert [device.keys() for device in devices["devices"]] == [DEVICE] * 2
        assert [device["away"] for device in devices["devices"]] == [False] * 2

        (put,) = (await seedwire("blob", "put", str(fleet.model), *at)).lines
        assert put == {"digest": first["model"]["digest"], "size_bytes": 2}
        copy = tmp_path / "copy"
        (got,) = (await seedwire("blob", "get", put["digest"], str(copy), *at)).lines
        assert got == {"file": str(copy), **put}
        assert copy.read_bytes() == fleet.model.read_bytes()

        await seedwire(*submission(fleet, "long", 10_000), *at)
        (stopping,) = (await seedwire("job", "stop", "long", *at)).lines
        assert stopping == {"job": "long", "stopping": True}

        examined = await seedwire("doctor", *at, "--model", str(fleet.model), "--engine", "fake")
        (found,) = examined.lines
        assert (examined.code, found["ok"]) == (0, True), found
        assert {one["check"] for one in found["findings"]} > {"broker", "scheduler", "model"}
        assert all(one.keys() == {"check", "state", "text", "mend"} for one in found["findings"])


async def test_errors_are_json_with_stable_codes(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=0) as fleet:
        at = ("--servers", fleet.broker.url)
        for arguments, code, words in (
            (("job", "watch", "nobody", *at), 1, "no job is called nobody"),
            (("job", "stop", "nobody", *at), 1, "nobody"),
            (("job", "stop", "a.b", *at), 2, "no job's name"),
            (("blob", "get", "d" * 64, str(tmp_path / "x"), *at), 1, "no file"),
            (("blob", "get", "short", "x", *at), 2, "no digest"),
            (("job", "watch"), 2, "JOB"),
        ):
            ran = await seedwire(*arguments)
            told = json.loads(ran.error)
            assert (ran.code, ran.lines, told["code"]) == (code, [], code), arguments
            assert words in told["error"]
        await fleet.services["scheduler"].stop()
        ran = await seedwire("devices", *at)
        assert ran.code == json.loads(ran.error)["code"] == 69


# ---- completion


@pytest.fixture
def path_with_seedwire(tmp_path: Path) -> str:
    """A PATH on which `seedwire` is this very console."""
    script = tmp_path / "bin" / "seedwire"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\ncd {ROOT}; exec {sys.executable} -m services.console "$@"\n')
    script.chmod(0o755)
    return f"{script.parent}:/usr/bin:/bin"


async def completed(path: str, line: str, servers: str) -> list[str]:
    """What bash offers for the last word of `line`, by the script that typer makes."""
    source = f"""
eval "$(_SEEDWIRE_COMPLETE=source_bash seedwire)"
COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_seedwire_completion seedwire
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    process = await asyncio.create_subprocess_exec(
        *("bash", "--norc", "-c", source),
        env={"PATH": path, "SEEDWIRE_SERVERS": servers},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert err == b""
    return out.decode().split()


async def test_bash_completes_commands_options_and_the_names_of_jobs(
    tmp_path: Path, path_with_seedwire: str
) -> None:
    async with a_fleet(tmp_path, devices=1) as fleet:
        for name in ("first", "final", "other"):
            await seedwire(*submission(fleet, name, 10_000), "--servers", fleet.broker.url)
        url = fleet.broker.url
        assert await completed(path_with_seedwire, "seedwire job w", "") == ["watch"]
        assert await completed(path_with_seedwire, "seedwire job submit --lab", "") == [
            "--labels",
            "--labels-from",
        ]
        for command in ("watch", "stop"):
            line = f"seedwire job {command} fi"
            assert await completed(path_with_seedwire, line, url) == ["final", "first"]


async def test_bash_completes_after_it_was_installed(
    tmp_path: Path, path_with_seedwire: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *("bash", "--norc", "-c", "seedwire --install-completion; bash -ic 'complete -p seedwire'"),
        env={"PATH": path_with_seedwire, "HOME": str(tmp_path), "SHELL": "/bin/bash"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # an interactive bash wants no terminal of ours
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert "bash completion installed" in out.decode()
    assert "_seedwire_completion seedwire" in out.decode()


async def test_a_broker_that_is_not_there_completes_nothing_soon_and_silently(
    path_with_seedwire: str,
) -> None:
    began = asyncio.get_running_loop().time()
    assert await completed(path_with_seedwire, "seedwire job watch x", "nats://127.0.0.1:9") == []
    assert asyncio.get_running_loop().time() - began < 10.0  # two starts of Python, and a second


@pytest.mark.parametrize("shell", ["zsh", "fish"])
async def test_other_shells_get_their_script_and_its_answers(
    shell: str, path_with_seedwire: str
) -> None:
    async def run(**more: str) -> str:
        process = await asyncio.create_subprocess_exec(
            "seedwire", env={"PATH": path_with_seedwire, **more}, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return out.decode()

    assert f"complete_{shell}" in await run(_SEEDWIRE_COMPLETE=f"source_{shell}")
    answer = await run(
        _SEEDWIRE_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="seedwire job wat",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert "watch" in answer
