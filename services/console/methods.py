"""Each method's numbers as its authors have them: what `--method` sets unless it is told otherwise.

Learning rates are of the paper's own parameters and losses, and hang on the model: they are a
place to start from. `batch_rows` is what one device measures at once, `directions` what a round
measures (K of FedKSeed), `step` the constant or first learning rate.
"""

from dataclasses import dataclass

Table = dict[str, object]

PLAIN: Table = {"how": "probe", "normalise": "none", "momentum": 0}
"""No method but ours has these."""


@dataclass(frozen=True, slots=True)
class Faithful:
    """Defaults by table of a job's settings, and where they are from."""

    source: str
    tables: dict[str, Table]


FEDKSEED: Table = {
    **PLAIN,
    "rounds": 40,
    "directions": 4096,
    "local_steps": 200,
    "batch_rows": 1,
    "eps": 5e-4,
    "step": 3e-7,
    "final_step": 1.0,
}

METHODS: dict[str, Faithful] = {
    "seedwire": Faithful("our own", {}),
    "mezo": Faithful(
        "Malladi et al., MeZO (NeurIPS 2023): LoRA on OPT, rank 8, batch 16, 20,000 steps",
        {
            "adapter": {"kind": "lora", "rank": 8, "distribution": "gauss8"},
            "tuning": {
                **PLAIN,
                "rounds": 20_000,
                "directions": 1,
                "batch_rows": 16,
                "eps": 1e-2,
                "step": 1e-4,
                "final_step": 1.0,
            },
        },
    ),
    "fwdllm": Faithful(
        "Xu et al., FwdLLM (USENIX ATC 2024), the authors' code: LoRA of rank 8, h = 0.01, "
        "variance at most 0.1, the best tenth of the candidates every second commit",
        {
            "adapter": {"kind": "lora", "rank": 8, "distribution": "gauss8"},
            "tuning": {
                **PLAIN,
                "rounds": 3000,
                "directions": 100,
                "batch_rows": 8,
                "eps": 1e-2,
                "step": 1e-2,
                "final_step": 0.0,
                "candidates": 10,
                "variance": "raw",
                "threshold": 0.1,
                "most_more": 40,
            },
        },
    ),
    "fedkseed": Faithful(
        "Qin et al., FedKSeed (ICML 2024), the authors' code: 4096 seeds, 200 local steps",
        {
            "adapter": {"kind": "lora", "rank": 8, "distribution": "gauss8"},
            "tuning": FEDKSEED,
        },
    ),
    "fedkseed-pro": Faithful(
        "Qin et al., FedKSeed-Pro: as fedkseed, seeds drawn by the size of their slopes",
        {
            "adapter": {"kind": "lora", "rank": 8, "distribution": "gauss8"},
            "tuning": FEDKSEED,
        },
    ),
}
