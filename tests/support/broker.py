"""A real nats-server for a test: `async with start_broker(tmp_path) as broker`."""

from shared.broker import BrokerProcess, start_broker

__all__ = ["BrokerProcess", "start_broker"]
