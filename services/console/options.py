"""The command line's options, once each, with their help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.console import completion

JOB, ADAPTER, METHOD, PACE = "Job", "Adapter", "Method", "Pace"

Servers = Annotated[
    str,
    typer.Option(envvar="SEEDWIRE_SERVERS", help="The broker's addresses, separated by commas."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs: an object, or one a line.")
]
JobName = Annotated[
    str,
    typer.Argument(metavar="JOB", help="The job's name.", autocompletion=completion.job_names),
]
Name = Annotated[str, typer.Option(help="What to call the job.", rich_help_panel=JOB)]
Model = Annotated[
    str,
    typer.Option(
        metavar="FILE|HUB",
        help="The GGUF file that the devices hold, or hf://OWNER/REPO[@REVISION]/FILE.",
        rich_help_panel=JOB,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL=WORD,...",
        help="Labels of the rows and the word that stands for each; a label alone is its own "
        "word. With labels the loss compares the words' first tokens. A space is put before a "
        "word unless the template ends in one. With --labels-from: other words for some of the "
        "labels there.",
        rich_help_panel=JOB,
    ),
]
LabelsFrom = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DIR|HUB",
        help="Take the labels from the rows there, each its own word unless --labels names "
        "another: JSONL, CSV, a directory of them, or hf://datasets/OWNER/REPO/FILE.",
        rich_help_panel=JOB,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help=r"How a row's text is put to the model; holds {text}. \n is a new line. "
        r"Default with labels: '{text}\nTopic:'.",
        rich_help_panel=JOB,
    ),
]
Spec = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file with tables task, tuning, pacing, evaluation, adapter; options win.",
        rich_help_panel=JOB,
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Then watch the job.", rich_help_panel=JOB)]
NoUpload = Annotated[
    bool,
    typer.Option(
        "--no-upload",
        help="Leave the model out of the blob store: the devices have it, or fetch --url.",
        rich_help_panel=JOB,
    ),
]
Url = Annotated[
    str | None,
    typer.Option(help="An HTTPS address where devices find the model.", rich_help_panel=JOB),
]
Adapter = Annotated[
    Literal["last-block", "output-rows", "lora", "control", "prompt"] | None,
    typer.Option(
        help="What is tuned: low-rank updates of the last block's matrices, and the labels' rows "
        "of the output matrix (default where the model has a closed form for it), those rows "
        "alone (default for other models, with labels), low-rank updates of any matrices (default "
        "without), a vector added after each layer, or a soft prompt before the answer (the "
        "cheapest probes on long rows).",
        rich_help_panel=ADAPTER,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="LoRA's rank (4).", rich_help_panel=ADAPTER),
]
TuneA = Annotated[
    bool | None,
    typer.Option(
        "--tune-a/--fixed-a",
        help="Whether a LoRA's A moves as well as its B (last-block: it does).",
        rich_help_panel=ADAPTER,
    ),
]
Targets = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="LoRA's matrices, as the GGUF names them (attn_q,attn_v or attn_qkv).",
        rich_help_panel=ADAPTER,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="all|A|A-B",
        help="Layers of lora (from 0) or control (from 1), both ends included (all).",
        rich_help_panel=ADAPTER,
    ),
]
PromptText = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What a soft prompt starts as, and stands for until it is tuned; it follows the "
        r"template. \n is a new line, and the default.",
        rich_help_panel=ADAPTER,
    ),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Tokens of a soft prompt: its text is repeated or cut to that; 0: as it is (8).",
        rich_help_panel=ADAPTER,
    ),
]
How = Annotated[
    Literal["exact", "probe"] | None,
    typer.Option(
        help="How slopes are measured: by two forward passes each, or in closed form from one pass "
        "for all (exact for last-block and output-rows).",
        rich_help_panel=METHOD,
    ),
]
Method = Annotated[
    Literal["seedwire", "mezo", "fwdllm", "fedkseed", "fedkseed-pro"] | None,
    typer.Option(
        help="How measurements become steps (seedwire). The others are as in their papers, with "
        "their papers' numbers (rounds, eps, step, directions, ...) unless told otherwise; --step "
        "is their learning rate.",
        rich_help_panel=METHOD,
    ),
]
LocalSteps = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Steps that a device takes by itself in a round: with last-block, in closed form "
        "(4; 0: it sends its gradient), with fedkseed along directions of the pool (200).",
        rich_help_panel=METHOD,
    ),
]
Pool = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="fedkseed: directions that there are for the whole job (4096).",
        rich_help_panel=METHOD,
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="fwdllm: of so many times --directions, every second commit takes the best (10).",
        rich_help_panel=METHOD,
    ),
]
Variance = Annotated[
    Literal["raw", "normalised"] | None,
    typer.Option(
        help="fwdllm: measure a batch again until two halves of the estimates differ by less than "
        "--threshold (raw), or agree by more (normalised: signal to noise).",
        rich_help_panel=METHOD,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="fwdllm: see --variance (raw 0.1).", rich_help_panel=METHOD),
]
Rounds = Annotated[
    int | None,
    typer.Option(min=1, help="Rounds of tuning (100; last-block 60).", rich_help_panel=METHOD),
]
Directions = Annotated[
    int | None,
    typer.Option(
        min=1, help="Directions in a round's pool (512; last-block 8192).", rich_help_panel=METHOD
    ),
]
Eps = Annotated[
    float | None,
    typer.Option(
        help="How far a probe steps along a direction (0.01; prompt 0.1).", rich_help_panel=METHOD
    ),
]
Step = Annotated[
    float | None,
    typer.Option(
        help="Length of a round's step along the gradient, in units of the adapter, falling to "
        "a tenth at the last round (0.01; output-rows 0.03). With local steps: the share of the "
        "fleet's mean move that a round makes (1.5). With normalise = none in --spec: the learning "
        "rate.",
        rich_help_panel=METHOD,
    ),
]
BatchRows = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Rows that a device measures a round on (32; last-block 512, output-rows 4096: each "
        "is sent forward only once).",
        rich_help_panel=METHOD,
    ),
]
Momentum = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=255,
        help="k of V = k/256 V + step; 230 is about 0.9 (0; last-block 128, output-rows 230).",
        rich_help_panel=METHOD,
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="A round closes by then with what came (60).",
        rich_help_panel=PACE,
    ),
]
EnoughDevices = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="A round closes when so many devices and --enough-probes came (1).",
        rich_help_panel=PACE,
    ),
]
EnoughProbes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Probes wanted of a round (64; with exact, directions times devices).",
        rich_help_panel=PACE,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="After its rounds the job waits for `seedwire distil` to open the next epoch, until "
        "there were so many (1).",
        rich_help_panel=PACE,
    ),
]
EvaluateEvery = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="ROUNDS",
        help="How often trusted devices measure held-out rows; 0: never (ten times a job, every 50"
        " rounds at least). What did best serves and is exported.",
        rich_help_panel=PACE,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="MEASUREMENTS",
        help="End tuning when so many in a row of held-out rows brought nothing better; 0: never"
        " (0).",
        rich_help_panel=PACE,
    ),
]
Engine = Annotated[Literal["llama", "fake"], typer.Option(hidden=True)]
