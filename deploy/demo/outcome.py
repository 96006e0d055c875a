"""What a run of the demo came to: its figures, its table, and what would make it a failure."""

from dataclasses import dataclass

from rich.table import Table

from deploy.demo.witness import Verdict

NEEDED_RISE = 0.20
CONTROL_RISE = 0.10
"""More than this with shuffled labels would mean that something other than the labels teaches."""


@dataclass
class Outcome:
    accuracy_before: float
    accuracy_after: float
    accuracy_majority: float
    tuning_seconds: float
    devices: int
    positions: dict[str, str]
    verdict: Verdict
    bytes_up_per_device_round: float
    bytes_down_per_device_round: float
    """The model itself left out: each device fetches it once."""
    daemon_peak_rss_mb: float
    engine_peak_rss_mb: float
    link_cuts: int
    kills: int
    labels: str = "true"

    @property
    def digests_equal(self) -> bool:
        """Every device stands at the digest with which the aggregator ended the job."""
        ends = {position.split(":")[-1] for position in self.positions.values()}
        return len(self.positions) == self.devices and ends == {self.verdict.final_digest}

    def figures(self) -> dict[str, object]:
        """What `build/demo.json` holds, under names that stay."""
        return {
            "labels": self.labels,
            "accuracy_before": round(self.accuracy_before, 4),
            "accuracy_after": round(self.accuracy_after, 4),
            "accuracy_majority": round(self.accuracy_majority, 4),
            "rounds": self.verdict.rounds,
            "tuning_seconds": round(self.tuning_seconds, 1),
            "devices": self.devices,
            "digests_equal": self.digests_equal,
            "updates_measured": self.verdict.measured,
            "updates_late": self.verdict.late,
            "updates_lost": len(self.verdict.lost),
            "updates_counted_twice": len(self.verdict.twice) + len(self.verdict.wrong_rounds),
            "bytes_up_per_device_round": round(self.bytes_up_per_device_round),
            "bytes_down_per_device_round": round(self.bytes_down_per_device_round),
            "daemon_peak_rss_mb": round(self.daemon_peak_rss_mb, 1),
            "engine_peak_rss_mb": round(self.engine_peak_rss_mb, 1),
            "link_cuts": self.link_cuts,
            "kills": self.kills,
        }

    def problems(self) -> list[str]:
        """What did not hold; empty for a good run."""
        rise = self.accuracy_after - self.accuracy_before
        found: list[str] = []
        if self.labels == "true":
            if rise < NEEDED_RISE:
                found.append(f"held-out accuracy rose by {rise:.1%}, less than {NEEDED_RISE:.0%}")
            if self.accuracy_after <= self.accuracy_majority:
                found.append("held-out accuracy ended at or below the majority baseline")
        elif rise > CONTROL_RISE:
            found.append(f"held-out accuracy rose by {rise:.1%} although the labels were shuffled")
        if not self.digests_equal:
            found.append(f"not all devices ended at the aggregator's adapter: {self.positions}")
        if not self.verdict.clean:
            found.append(
                f"the witness found updates lost {self.verdict.lost}, counted twice"
                f" {self.verdict.twice}, rounds with wrong sums {self.verdict.wrong_rounds}"
            )
        if not self.link_cuts:
            found.append("no link failed: the run shows nothing about links that fail")
        if not self.kills:
            found.append("no device was killed")
        return found


def shown(outcome: Outcome) -> Table:
    """The table at the end."""
    verdict = outcome.verdict
    table = Table(title="Before and after", show_header=True, title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row(
        "held-out accuracy", f"{outcome.accuracy_before:.1%}", f"{outcome.accuracy_after:.1%}"
    )
    table.add_row("  always the commonest family", "", f"{outcome.accuracy_majority:.1%}")
    table.add_row("rounds", "", f"{verdict.rounds} in {outcome.tuning_seconds:.0f} s")
    same = "one, everywhere" if outcome.digests_equal else "DIFFERENT"
    table.add_row("adapter on devices and aggregator", "", same)
    table.add_row(
        "a device and round sent / received, the model aside",
        "",
        f"{outcome.bytes_up_per_device_round:.0f} / {outcome.bytes_down_per_device_round:.0f} B",
    )
    table.add_row(
        "peak memory, daemon / engine",
        "",
        f"{outcome.daemon_peak_rss_mb:.0f} / {outcome.engine_peak_rss_mb:.0f} MB",
    )
    table.add_row("links cut, devices killed", "", f"{outcome.link_cuts}, {outcome.kills}")
    table.add_row(
        "updates measured, late, lost, counted twice",
        "",
        f"{verdict.measured}, {verdict.late}, {len(verdict.lost)}, "
        f"{len(verdict.twice) + len(verdict.wrong_rounds)}",
    )
    return table
