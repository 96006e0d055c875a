"""Tuning methods, found by their name in the job: how a pool of slopes becomes a commit."""

from collections.abc import Callable

from services.aggregator.methods import seedwire
from services.aggregator.methods.seedwire import Closing
from services.aggregator.pooling import Pool
from shared.messages import RoundOpened, Tuning

METHODS: dict[str, Callable[[Pool, Tuning, RoundOpened], Closing]] = {"seedwire": seedwire.close}

__all__ = ["METHODS", "Closing"]
