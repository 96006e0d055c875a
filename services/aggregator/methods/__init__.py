"""Tuning methods, found by their name in the job: how what devices measure becomes a commit."""

from services.aggregator.methods.fedkseed import FedKSeed
from services.aggregator.methods.fedkseed_pro import FedKSeedPro
from services.aggregator.methods.fwdllm import FwdLLM
from services.aggregator.methods.method import Closing, Method, Past, Plan, RoundSums
from services.aggregator.methods.mezo import Mezo
from services.aggregator.methods.seedwire import Seedwire

METHODS: dict[str, Method] = {
    "seedwire": Seedwire(),
    "mezo": Mezo(),
    "fwdllm": FwdLLM(),
    "fedkseed": FedKSeed(),
    "fedkseed-pro": FedKSeedPro(),
}

__all__ = ["METHODS", "Closing", "Method", "Past", "Plan", "RoundSums"]
