"""What the proxy counts, for Prometheus. An autoscaler reads the first two gauges."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from services.proxy_inference.ensemble.counts import Counts
from services.proxy_inference.pool import Pool
from services.proxy_inference.routing import Routes, Table
from services.proxy_inference.swapping import Swapper
from services.proxy_inference.worker import Worker
from shared.runtime import project_version

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The proxy's own registry."""

    def __init__(self, worker: Worker, pool: Pool, swapper: Swapper, routes: Routes) -> None:
        self._registry = CollectorRegistry()
        self.in_flight = 0
        """Requests that are being answered."""
        self.waiting: Callable[[], int] = lambda: 0
        """How many answers wait for their first pass."""
        self.requests = Counter(
            "seedwire_proxy_requests",
            "Requests answered, by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.tokens = Counter(
            "seedwire_proxy_tokens",
            "Tokens: of prompts, of them those found in the cache, and written.",
            ["kind"],
            registry=self._registry,
        )
        self.first_token_s = Histogram(
            "seedwire_proxy_first_token_seconds",
            "From a request to the first token of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.request_s = Histogram(
            "seedwire_proxy_request_seconds",
            "From a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Present(self, worker, pool, swapper, routes))

    def exposition(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)


def _ensemble(counts: Counts) -> Iterator[Metric]:
    """Of the large model steered by small ones; P is the ensemble, L the large, M+ the tuned."""
    drafts = CounterMetricFamily(
        "seedwire_proxy_drafts",
        "Tokens drafted by the tuned small model, by place after what was certain, and fate.",
        labels=["place", "fate"],
    )
    for place, (drafted, taken) in enumerate(zip(counts.drafted, counts.taken, strict=True), 1):
        if drafted or place == 1:
            drafts.add_metric([str(place), "taken"], taken)
            drafts.add_metric([str(place), "refused"], drafted - taken)
    yield drafts
    plain: dict[str, tuple[str, float]] = {
        "ensemble_passes": ("Passes of a large model that was steered.", counts.passes),
        "ensemble_tokens": ("Tokens written by passes without a prompt.", counts.tokens),
        "ensemble_seconds": ("Time of those passes: tokens over it is the speed.", counts.seconds),
        "ensemble_rollbacks": ("Times caches were cut back to a refused draft.", counts.rollbacks),
        "ensemble_watched": ("Positions at which divergences were measured.", counts.divergences),
        "ensemble_kl_large_nats": ("Sum over them of KL(P || L).", counts.from_large),
        "ensemble_kl_tuned_nats": ("Sum over them of KL(P || M+).", counts.from_tuned),
    }
    for name, (sentence, value) in plain.items():
        yield CounterMetricFamily(f"seedwire_proxy_{name}", sentence, value=value)


def _routes(table: Table, version: str) -> Iterator[Metric]:
    """What each mode came to on the validation rows."""
    told = {
        "loss_nats": "Loss on the validation rows, a token, or a row of choices.",
        "accuracy": "Share of the validation rows that are answered right throughout.",
        "best": "1 for the mode that serves requests which name none, unless --mode does.",
    }
    labels = ["version", "mode", "alpha"]
    families = {
        name: GaugeMetricFamily(f"seedwire_proxy_route_{name}", sentence, labels=labels)
        for name, sentence in told.items()
    }
    for line in table.lines:
        alpha = "" if line.route.alpha is None else f"{line.route.alpha:g}"
        values = {
            "loss_nats": line.loss,
            "accuracy": line.accuracy,
            "best": float(line.route == table.best),
        }
        for name, value in values.items():
            families[name].add_metric([version, line.route.mode, alpha], value)
    yield from families.values()


class _Present(Collector):
    """What is read off the others whenever Prometheus asks."""

    def __init__(
        self, metrics: Metrics, worker: Worker, pool: Pool, swapper: Swapper, routes: Routes
    ) -> None:
        self._metrics = metrics
        self._worker = worker
        self._pool = pool
        self._swapper = swapper
        self._routes = routes

    def collect(self) -> Iterator[Metric]:
        counts = self._pool.counts
        gauges: dict[str, tuple[str, float]] = {
            "requests_in_flight": (
                "Requests that are being answered.",
                self._metrics.in_flight,
            ),
            "requests_waiting": (
                "Answers that wait for a place in a pass.",
                self._metrics.waiting(),
            ),
            "sequences_running": ("Answers in the present pass.", counts.running),
            "versions_loaded": ("Models and adapters in memory.", len(self._pool.alive)),
            "pass_seconds": (
                "For how long the present pass has been computed.",
                self._worker.pass_s,
            ),
        }
        for name, (sentence, value) in gauges.items():
            yield GaugeMetricFamily(f"seedwire_proxy_{name}", sentence, value=value)
        counters: dict[str, tuple[str, int]] = {
            "swaps": ("Times another version began to serve.", self._pool.swaps),
            "versions_refused": (
                "Versions that could not be loaded or were not what was published.",
                self._swapper.refused,
            ),
            "passes": ("Passes through a model.", counts.passes),
            "pass_tokens": ("Tokens sent through a model.", counts.tokens),
            "passes_failed": ("Passes that failed; their answers ended.", counts.failed_passes),
            "answers_not_finite": ("Answers ended by a NaN.", counts.not_finite),
            "preemptions": (
                "Times an answer gave up its place for lack of cache and came again.",
                counts.preempted,
            ),
        }
        for name, (sentence, value) in counters.items():
            yield CounterMetricFamily(f"seedwire_proxy_{name}", sentence, value=value)
        if self._pool.large is not None:
            yield from _ensemble(self._pool.large.counts)
        held = self._pool.default
        if held is not None and (table := self._routes.of(held.fingerprint)) is not None:
            yield from _routes(table, held.name)
        yield self._version()

    def _version(self) -> Metric:
        info = GaugeMetricFamily(
            "seedwire_proxy_version_info",
            "The version that serves requests which name none.",
            labels=["job", "round", "fingerprint", "software"],
        )
        held = self._pool.default
        if held is not None:
            job = held.version.job if held.version else ""
            number = str(held.version.round) if held.version else ""
            info.add_metric([job, number, held.fingerprint, project_version()], 1.0)
        return info
