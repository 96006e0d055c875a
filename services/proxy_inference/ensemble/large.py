"""The large model in this process, and ensembles over it."""

from services.proxy_inference.ensemble.costs import Curves
from services.proxy_inference.ensemble.counts import Counts
from services.proxy_inference.ensemble.ensemble import Ensemble
from services.proxy_inference.generation import Generation, Weights, steering
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import Room
from shared.adapter import Adapter
from shared.engine.agreement import disagreement
from shared.engine.native import native
from shared.errors import EngineError


class Large:
    """A GGUF file in memory, which small models may steer."""

    def __init__(self, file: ModelFile, counts: Counts, *, speculates: bool) -> None:
        """Raises EngineError for a file that cannot be served."""
        self.name = file.path.name
        self.digest = file.digest
        self.counts = counts
        self._weights = Weights(file, tuned=False)
        model = self._weights.model
        if native.llama_model_is_recurrent(model) or native.llama_model_is_hybrid(model):
            self._weights.close()
            raise EngineError(
                f"{file.path}: a model with a recurrent state cannot take back what it has read; "
                "use a large model of attention alone"
            )
        self._curves: dict[str, Curves] = {}
        """By the small model's digest."""
        self._speculates = speculates

    def check(self, small: Weights) -> None:
        """Raises EngineError where the two models' tokens do not mean the same."""
        why = disagreement(small.vocabulary, self._weights.vocabulary)
        if why:
            raise EngineError(
                f"{self._weights.path} cannot be steered by {small.path}: their tokenizers differ: "
                f"{why}; use a large model of the same family"
            )

    def over(
        self, small: Weights, adapter: Adapter | None, anchor: Adapter | None, room: Room
    ) -> Ensemble:
        """The large model, steered by `adapter` over `small`, where there is one.

        `anchor` is what of the adapter is no evidence of the fleet's: it is in the base as well.

        Raises:
            EngineError: they do not go together, or there is no memory.
        """
        self.check(small)
        opened: list[Generation] = []
        try:
            opened.append(Generation(self._weights, None, room, drafted=self._speculates))
            if adapter is not None:
                opened.append(steering(small, adapter, room))
                opened.append(Generation(small, anchor, room, drafted=self._speculates))
            large, tuned, base = [*opened, None, None][:3]
            assert large is not None
            curves = self._curves.setdefault(small.digest, Curves())
            tokens = min(small.vocabulary.size, self._weights.vocabulary.size)
            return Ensemble(
                large,
                tuned,
                base,
                self.counts,
                curves,
                tokens=tokens,
                speculates=self._speculates,
            )
        except EngineError:
            for generation in opened:
                generation.close()
            raise

    def close(self) -> None:
        self._weights.close()
