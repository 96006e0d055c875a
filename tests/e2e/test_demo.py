"""`make demo` itself: the shipped model in the real llama.cpp, bad links, a killed device."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from deploy.demo.processes import ROOT


@pytest.mark.timeout(400)
async def test_the_demo_teaches_the_fleet_and_loses_nothing(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "deploy.demo", "--build", str(tmp_path)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["accuracy_after"] >= figures["accuracy_before"] + 0.2
    assert figures["accuracy_after"] > figures["accuracy_majority"]
    assert figures["digests_equal"]
    assert (figures["updates_lost"], figures["updates_counted_twice"]) == (0, 0)
    assert figures["link_cuts"] > 0
    assert figures["kills"] == 1
