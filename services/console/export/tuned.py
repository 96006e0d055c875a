"""An adapter on its way out: its numbers, its base model, and what is known of both."""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from services.console.export.history import History
from shared.adapter import Adapter
from shared.engine.adapter_tensors import LoraTensors, control_vectors
from shared.engine.fitting import OUTPUT
from shared.engine.gguf_file import Header
from shared.engine.model import Adaptation
from shared.messages import JobSpec, Variant

_ON_A_HUB = re.compile(r"https://huggingface\.\w+/([\w.-]+/[\w.-]+)/?$")
"""An address of a model on a hub: its owner and its name."""


@dataclass(frozen=True)
class Base:
    """The model that the adapter stands on, as its GGUF file tells it."""

    variant: Variant
    header: Header
    given_name: str | None = None

    @property
    def name(self) -> str:
        """What loads it on a hub, or else what the file calls it."""
        return self.hub_name or self.header.text("general.name") or self.variant.name

    @property
    def hub_name(self) -> str:
        """What loads it on a hub; empty where neither the operator nor the file says that."""
        found = _ON_A_HUB.match(self.source)
        return self.given_name or (found[1] if found else "")

    @property
    def source(self) -> str:
        """The address that the file says it was made from; empty where it says none."""
        names = ("general.source.url", "general.source.repo_url", "general.repo_url")
        return next((found for name in names if (found := self.header.text(name))), "")

    @property
    def is_tied(self) -> bool:
        """Its output matrix is its embedding table."""
        return OUTPUT not in self.header.tensors


@dataclass(frozen=True)
class Tuned:
    """The adapter of one job after one round."""

    job: str
    spec: JobSpec
    adapter: Adapter
    base: Base
    history: History

    @cached_property
    def blocks(self) -> Adaptation:
        manifest, offsets = self.adapter.manifest, self.adapter.layout.offsets
        return Adaptation(
            manifest.architecture, manifest.seed, manifest.epoch_of_a, manifest.blocks, offsets
        )

    @property
    def kinds(self) -> set[str]:
        return {block.kind for block in self.blocks.blocks}

    @property
    def names(self) -> list[str]:
        """The model's tensors that a LoRA of it adds to."""
        return LoraTensors(self.base.header, self.blocks).names

    def pairs(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Of each of those tensors A (rank, d_in) and B (d_out, rank): B A is added."""
        return LoraTensors(self.base.header, self.blocks).pairs(self.adapter.values())

    def vectors(self) -> dict[int, NDArray[np.float32]]:
        """What is added to the residual stream after a layer: (n_embd,)."""
        return control_vectors(self.blocks, self.adapter.values())
