"""What is trained and what is asked of every run: streams, ways of training, changed factors and comparisons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)  # of the rows that claims compare
TRIAL_SEED = 100  # of the runs that choose learning rates
EPOCHS = {"grey": 2, "four": 3, "caltech": 4}
TASKS = {"grey": 5, "four": 20, "caltech": 10}
# By validation accuracy on another seed, see `run.py --rates`.
RATES = {"full": 3e-4, "linearized": 3e-4, "lora": 1e-3}
# Likewise, by `run.py --strengths`, out of those that are tried; the stream of 20 tasks takes those of the first.
TRIED: dict[str, dict[str, tuple[float, ...]]] = {
    "ITA, base": {"grey": (2, 200, 2e4), "caltech": (2, 200, 2e4)},
    "IEL, base": {"grey": (0.02, 2, 200), "caltech": (0.02, 2, 200)},
    "EWC": {"grey": (5, 50, 500, 5000, 5e4, 5e5, 5e6), "caltech": (500, 5000, 5e4, 5e5, 5e6)},
    "LwF": {"grey": (0.1, 1, 3, 10), "caltech": (0.1, 1, 3, 10)},
    "L2": {"grey": (0.01, 1, 10, 100), "caltech": (0.01, 1, 10, 100)},
}
STRENGTHS: dict[str, dict[str, float]] = {
    "ITA, base": {"grey": 200, "four": 200, "caltech": 2e4},
    "IEL, base": {"grey": 0.02, "four": 0.02, "caltech": 0.02},
    "EWC": {"grey": 500, "four": 500, "caltech": 5e5},
    "LwF": {"grey": 3, "four": 3, "caltech": 3},
    "L2": {"grey": 1, "four": 1, "caltech": 100},
}
TEMPLATES = {
    "mnist": 'a photo of the number: "{}".',
    "fashion": "a photo of a {}.",
    "kmnist": "a photo of the kana {}.",
    "notmnist": "a photo of the letter {}.",
    "pneumonia": "a photo of {}.",
}


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        method: Preset that says how it is trained.
        own: Whether the preset's mergers ride on the run, since the next task starts from what they make.
        policy: Start policy, where it is not the preset's.
        rate: Whose learning rate it takes.
        expert: What the un-merged model's row is called, if it is shown.
        strength: Regularizer of the preset and its parameter that says how much it counts, ``CLASS.PARAMETER``.
    """

    method: str
    own: bool = False
    policy: str | None = None
    rate: str = "full"
    expert: str | None = None
    strength: str | None = None


WAYS = {
    "full, base": Way("task_arithmetic"),
    "full, previous": Way("magmax", expert="sequential fine-tuning"),
    "LoRA, base": Way("lora_task_arithmetic", rate="lora"),
    "linearized, base": Way("tangent_task_arithmetic", rate="linearized"),
    "attention, base": Way("attention_only"),
    "SAM, base": Way("sam_merging"),
    "SWA, base": Way("swa", policy="base"),
    "ITA, base": Way("ita", strength="ITA.alpha"),
    "IEL, base": Way("iel", strength="IEL.beta"),
    "LoRA, previous": Way("lora_task_arithmetic", policy="previous", rate="lora"),
    "linearized, previous": Way("tangent_task_arithmetic", policy="previous", rate="linearized"),
    "linearized LoRA, base": Way("l_lora", rate="lora"),
    "full, merged": Way("coma", own=True),
    "full, merged, Fisher": Way("cofima", own=True),
    "full, merged, line": Way("became", own=True),
    "full, best share": Way("paint", own=True),
    "branches": Way("bam", own=True, expert="Branch-and-Merge"),
    "LoRA, sum, tuned": Way("chitale_lora", own=True, rate="lora"),
    "EWC": Way("ewc", own=True, expert="EWC", strength="EWC.strength"),
    "LwF": Way("lwf", own=True, expert="LwF", strength="LwF.strength"),
    "L2": Way("l2", own=True, expert="L2 to the start", strength="L2.strength"),
    "replay": Way("replay", own=True, expert="experience replay, 500 images"),
    "joint": Way("joint", own=True, expert="joint training"),
    "class means": Way("simple_cil", own=True, expert="class means, frozen"),
}


def option(kind: str, /, **settings: Any) -> dict[str, Any]:
    """Write a class with settings."""
    return {"class_path": kind, "init_args": settings}


def pipeline(reducer: str, finisher: str) -> dict[str, Any]:
    """Write a rule with a finisher."""
    return option("Pipeline", reducer=option(reducer), finisher=option(finisher))


FREE: list[Any] = [
    *("WeightAverage", "TaskArithmetic", "MagMax", "TIES", "DARE", "Breadcrumbs", "PCB", "Consensus", "ModelStock"),
    *("MetaGPT", "SLERP", "TSVM", "IsoC", "IsoCTS", "SVC", "DCMerge", "OPCM", "WIDEN", "EMR", "TALL"),
    "KnOTS",
]
# In closed form, for which the ridge decides whether the merged matrices stay near the experts'.
CLOSED: list[Any] = ["ACTMat", option("WUDI", solver="ridge")]
MEASURED = ["Fisher", "RegMean", "LoRM", "MaTS", "UGM"]
REST: list[Any] = ["DELLA", "NuFilt", "RandomMix", "FisherMaskNodes", "GreedySoup", "SortedSoup"]
FEW: list[Any] = ["WeightAverage", "TaskArithmetic", "MagMax", "TIES", "TSVM"]
SCALED = ["--scale=0.1,0.2,0.3,0.5,1,1.5,2"]
GRID = ["--grid", "RegMean.reduce=0.1,0.5,0.9", "LoRM.reduce=0.1,0.5,0.9"]
BUFFER = ["--adaptation.source=buffer", "--adaptation.per_class=10"]
SHORT = {"steps": 40, "lr": 0.01}  # fewer and longer steps than is published: coefficients get about as far


def mergers(rules: list[Any]) -> str:
    """Write rules as one option."""
    return "--mergers=" + yaml.safe_dump(rules, default_flow_style=True, width=10**6).strip()


COMPARISONS: dict[str, list[str]] = {
    "all": [mergers([*FREE, *MEASURED]), *SCALED, *GRID],
    # With 20 tasks PCB takes two minutes for its merges, KnOTS and MaTS half a minute: one seed has them there.
    "most": [mergers([r for r in [*FREE, *MEASURED] if r not in ("PCB", "KnOTS", "MaTS")]), *SCALED, *GRID],
    "closed": [mergers(CLOSED), *SCALED, "--grid", *(f"{name}.ridge=1e-8,0.01,0.1" for name in ("ACTMat", "WUDI"))],
    "widen": [mergers(["WIDEN"]), "--grid", "WIDEN.calibrated=0.05,0.1,0.2,0.5,1"],
    "lines": [
        mergers([pipeline("TaskArithmetic", "LiNeS")]),
        "--grid",
        "Pipeline.reducer.scale=0.1,0.2,0.3,0.5,1,1.5,2",
    ],
    "rest": [mergers(REST), *SCALED],
    "dop": [mergers(["DOP"])],
    "few": [mergers(FEW), *SCALED],
    "low_rank": [mergers([*FEW, "KnOTS"]), *SCALED],
    "why": [mergers(["WeightAverage"]), "--diagnose"],
    # The last model as it is: what a baseline reaches on validation images.
    **{
        f"last of {n}": [mergers([option("TaskArithmetic", weights=[0] * (n - 1) + [1])]), "--scale=1"]
        for n in TASKS.values()
    },
    "head": [mergers(["WeightAverage"]), "--calibrations=[SampleTuning]"],
    "wudi": [mergers(["WUDI"]), "--scale=0.2,0.5,1"],
    "learned": [*BUFFER, mergers([option("AdaMerging", **SHORT)])],
    "labelled": [*BUFFER, "--adaptation.labels=true", mergers([option("LearnedSoup", steps=40)])],
    "routed": [mergers(["WeightAverage"]), "--routings=[Smile, GaussianPosterior]"],
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        stream: Name of its stream.
        way: Its way of training.
        seed: Seed of class order, validation cut and training.
        change: What differs from the usual settings, ``FACTOR=VALUE``; empty for nothing.
        rate: Learning rate, where it is not that of the way.
        strength: Strength of the regularizer, where it is not that of the way.
    """

    stream: str
    way: str
    seed: int
    change: str = ""
    rate: float | None = None
    strength: float | None = None

    @property
    def lr(self) -> float:
        """Learning rate."""
        factor, _, value = self.change.partition("=")
        return float(value) if factor == "lr" else self.rate or RATES[WAYS[self.way].rate]

    @property
    def name(self) -> str:
        """Name of its folder."""
        trial = [f"{one:g}" for one in (self.rate, self.strength) if one]
        words = [self.stream, self.way, self.change, *trial, f"seed{self.seed}"]
        return "-".join(re.sub(r"[^\w.=]+", "_", word) for word in words if word)


@dataclass(frozen=True)
class Study:
    """A run and what is asked of it afterwards, by names of comparisons."""

    run: Run
    comparisons: tuple[str, ...] = ()


CHANGES: dict[str, list[str]] = {
    "grey": ["loss=all", "lr=1e-4", "lr=1e-3", "images=10", "loss=seen"],
    "four": ["tasks=5", "loss=all", "tasks=10"],
    "caltech": [
        *("backbone=medium-20", "lr=1e-4", "backbone=small", "tasks=5", "loss=seen", "lr=1e-3"),
        *("images=5", "tasks=20", "backbone=large"),
    ],
}
FROZEN = ("backbone", "tasks", "images")  # factors that change what class means reach, without any training
TRAINED = {"grey": 84, "caltech": 28}  # training images a class, on average: fewer get as many steps by more epochs


def trial_of(run: Run) -> str:
    """Return the comparison that says what a trial reaches on validation images."""
    return f"last of {TASKS[run.stream]}" if WAYS[run.way].own else "few"


def studies(streams: list[str], seeds: list[int], more: list[int]) -> Iterator[Study]:
    """List all studies, what matters most first; those with more seeds are of the rows that claims compare."""

    def each(*ways: str, of: Sequence[str] = streams, seeds: Sequence[int] = seeds) -> Iterator[tuple[str, str, int]]:
        return ((stream, way, seed) for way in ways for seed in seeds for stream in streams if stream in of)

    def whole(of: Sequence[str], seeds: Sequence[int]) -> Iterator[Study]:
        for stream, way, seed in each("full, base", of=of, seeds=seeds):
            asked = "all" if seed == 0 or (stream != "four" and seed in SEEDS) else "most"
            yield Study(Run(stream, way, seed), ("closed", "lines", "widen", asked))

    def ways(of: Sequence[str], *names: str, seeds: Sequence[int] = seeds) -> Iterator[Study]:
        for stream, way, seed in each(*names, of=of, seeds=seeds):
            asked = () if WAYS[way].own else ("low_rank" if "LoRA" in way else "few",)
            yield Study(Run(stream, way, seed), asked)

    def asked(of: Sequence[str], *names: str, seeds: Sequence[int] = seeds) -> Iterator[Study]:
        for stream, way, seed in each("full, base", of=of, seeds=seeds):
            yield Study(Run(stream, way, seed), names)

    def changed(*places: int) -> Iterator[Study]:
        for place in places:
            for seed in seeds:
                for stream in streams:
                    for change in CHANGES[stream][place : place + 1]:
                        yield Study(Run(stream, "full, base", seed, change), ("few", "why"))
                        if change.startswith(FROZEN):
                            yield Study(Run(stream, "class means", seed, change))

    small = [stream for stream in streams if stream != "four"]
    four = ["four"]
    yield from whole(streams, seeds)
    yield from asked(streams, "why")
    yield from ways(streams, "class means", "full, previous")
    yield from ways(small, "joint", "replay", "LoRA, base", "linearized, base")
    yield from changed(0)
    yield from asked(streams, "head")
    yield from changed(1, 2)
    yield from ways(small, "SAM, base", "SWA, base", "attention, base", "full, merged", "EWC", "LwF")
    yield from asked(small, "wudi", "learned")
    yield from ways(small, "full, merged, Fisher", "full, best share", "branches")
    yield from changed(3)
    yield from ways(small, "ITA, base", "IEL, base", "L2")
    yield from asked(small, "routed", "labelled")
    yield from asked(streams, "rest")
    yield from changed(4, 5, 6, 7, 8)
    yield from ways(small, "LoRA, previous", "linearized, previous", "linearized LoRA, base", "LoRA, sum, tuned")
    yield from ways(small, "full, merged, line")
    yield from asked(small, "dop")
    yield from ways(four, "joint", "replay", "full, merged", "branches", "attention, base", "SAM, base", "LoRA, base")
    yield from ways(four, "linearized, base", "full, best share", "full, merged, Fisher")
    yield from whole(small, more)
    yield from ways(four, "EWC", "LwF", "SWA, base")
    yield from ways(streams, "class means", "full, previous", "full, merged", seeds=more)
    yield from ways(four, "full, base", seeds=more)
    yield from ways(small, "linearized, base", "LoRA, base", "branches", "full, best share", "SAM, base", seeds=more)
    yield from ways(small, "attention, base", "SWA, base", "full, merged, Fisher", "replay", seeds=more)
    yield from asked(streams, "head", seeds=more)
    yield from ways(four, "full, merged, line", "L2", "LoRA, previous", "LoRA, sum, tuned", "ITA, base", "IEL, base")
    yield from ways(four, "linearized LoRA, base")
    yield from asked(small, "wudi", "learned", seeds=more)
    yield from asked(four, "wudi")


def stream_config(name: str, work: Path, change: str = "") -> dict[str, Any]:
    """Return what all methods share on a stream: data, backbone, budget."""
    factor, _, value = change.partition("=")
    epochs = EPOCHS[name]
    tasks = TASKS[name]
    if factor == "tasks":
        tasks = int(value)
    shared: dict[str, Any] = {
        "data": {"batch_size": 32},
        "logging": {"wandb": False, "csv": False},
        "trainer": {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "limit_val_batches": 0,
        },
    }
    if factor == "images":
        shared["trainer"]["max_epochs"] = max(epochs, round(epochs * TRAINED[name] / int(value)))
        shared["transforms"] = [option("FewShot", shots=int(value), seed=0)]
    model: dict[str, Any] = {"loss_classes": value if factor == "loss" else "current"}
    if name == "caltech":
        size = value if factor == "backbone" else "medium"
        backbone = {"name": f"local-dir:{work / 'caltech' / size}", "pretrained": True, "image_size": 64}
        source = option("ImageFolderSource", root=str(work / "caltech" / "stream"))
        model |= {"backbone": option("Timm", **backbone), "head": "CosineHead"}
    else:
        model |= {"backbone": "OpenClip"}
    if name == "grey":
        files = [(work / "grey" / f"{key}.npz", template) for key, template in TEMPLATES.items()]
        sources = [option("NpzSource", path=str(file), templates=[template]) for file, template in files]
        return shared | {"stream": option("TaskIncremental", sources=sources, name="grey"), "model": model}
    if name == "four":
        source = option("NpzSource", path=str(work / "grey" / "four.npz"), templates=["a photo of a {}."])
    return shared | {
        "stream": option("ClassIncremental", source=source, num_tasks=tasks, class_order="random"),
        "model": model,
    }


def config_of(run: Run, work: Path) -> list[dict[str, Any]]:
    """Return the configurations of one run, the later ones over the earlier ones."""
    way = WAYS[run.way]
    preset = yaml.safe_load((METHODS / f"{way.method}.yaml").read_text())
    adam = option("AdamW", lr=run.lr, weight_decay=0.0)
    optimizer = option("SAM", base=adam) if way.method == "sam_merging" else adam
    last: dict[str, Any] = {"seed": run.seed, "model": {"optimizer": optimizer}}
    if not way.own:
        last["mergers"] = ["WeightAverage"]
    if way.strength:
        regularizer, parameter = way.strength.split(".")
        strength = run.strength or STRENGTHS[run.way][run.stream]
        last["model"]["regularizers"] = [option(regularizer, **{parameter: strength})]
    if way.policy:
        last["learner"] = {"start_policy": way.policy}
    base = stream_config(run.stream, work, run.change)
    base["stream"]["init_args"]["seed"] = run.seed
    return [base, preset, last]
