"""Fixtures that more than one folder uses."""

import os

# Before numpy is imported: BLAS threads that spin on busy cores slow small products a hundredfold.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from shared.bus import Link
from tests.support.broker import BrokerProcess, start_broker
from tests.support.hubs import Hub, MemoryHub, NatsHub


@pytest.fixture(autouse=True, scope="session")
def config_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes what this user has configured."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncGenerator[BrokerProcess, None]:
    """A nats-server of this test's own."""
    async with start_broker(tmp_path / "broker") as process:
        yield process


@pytest.fixture
async def nats_hub(broker: BrokerProcess) -> AsyncGenerator[NatsHub, None]:
    hub = NatsHub(broker)
    yield hub
    await hub.close()


@pytest.fixture
def memory_hub() -> MemoryHub:
    return MemoryHub()


@pytest.fixture(params=["memory", "nats"])
def hub(request: pytest.FixtureRequest) -> Hub:
    """Either broker: what a test says of it holds for both."""
    return request.getfixturevalue(f"{request.param}_hub")


@pytest.fixture
async def bus(hub: Hub) -> Link:
    """One connection to either broker."""
    return await hub.connect("bus")
