"""Every method on a real fleet: broker, services and devices as processes, the fake engine."""

from pathlib import Path

from msgspec.structs import replace

from shared.messages import (
    Block,
    Evaluation,
    JobSpec,
    Pacing,
    RoundClosed,
    RoundOpened,
    SubmitJob,
    Tuning,
)
from tests.support.fleet import a_fleet, a_task
from tests.support.jobs import adapter_after

TUNINGS = {
    "mezo": Tuning(directions=16, final_step=1.0),
    "fwdllm": Tuning(directions=16, final_step=0.0, candidates=4, threshold=1e-12, most_more=2),
    "fedkseed": Tuning(directions=64, final_step=1.0, local_steps=30),
    "fedkseed-pro": Tuning(directions=64, final_step=1.0, local_steps=30),
}
BLOCKS = [
    Block("lora_b", "blk.0.mix.weight", [32], d_in=32),
    Block("control", "", [32], layer=1),
]


async def test_every_method_ends_at_the_digest_that_its_log_makes(tmp_path: Path) -> None:
    async with a_fleet(tmp_path, devices=2) as fleet:
        for method, tuning in TUNINGS.items():
            spec = JobSpec(
                task=a_task(),
                tuning=replace(
                    tuning,
                    method=method,
                    rounds=4,
                    batch_rows=4 if tuning.local_steps else 64,
                    step=0.01 if tuning.local_steps else 0.1,
                    normalise="none",
                ),
                pacing=Pacing(
                    enough_devices=2,
                    enough_probes=2 * (tuning.local_steps or tuning.directions),
                    deadline_s=20.0,
                ),
                evaluation=Evaluation(every_rounds=4),
            )
            job: SubmitJob = fleet.job(method, spec, BLOCKS)
            await fleet.submit(job)
            events = await fleet.events_until(method)
            closes = [event for event in events if isinstance(event, RoundClosed)]
            assert adapter_after(job.manifest, events).digest() == closes[-1].digest
            tuned = [close for close in closes if close.reason in ("enough", "deadline")]
            moved = [close for close in tuned if not close.more]
            assert len(moved) == 4, method
            assert all(close.commit is not None for close in moved)
            assert all(close.commit is None for close in tuned if close.more)
            assert moved[-1].loss is not None
            assert moved[0].loss is not None
            assert moved[-1].loss < moved[0].loss, (method, [close.loss for close in moved])
            opened = [event for event in events if isinstance(event, RoundOpened)]
            assert any(one.survivors for one in opened) == (method == "fwdllm")
            assert any(close.more for close in closes) == (method == "fwdllm")
            assert any(one.walk for one in opened) == method.startswith("fedkseed")
