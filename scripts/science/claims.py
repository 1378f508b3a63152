"""What papers claim of the methods that presets ship, as differences between two rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from collect import FILE
from intervals import Interval, interval_of, mean_of_groups
from rows import STREAMS, Row

ADAPTIVE = FILE.with_name("adaptive.json")
ADAPTIVE_STREAMS = {"q": "quickstart's digits", "g": "grey, 1500 images a set"}


@dataclass(frozen=True)
class Claim:
    """A claim that holds where the first row is ahead of the second.

    Attributes:
        text: What is claimed.
        source: arXiv id.
        first: Label of a row.
        second: Label of another.
        reading: ``own`` (what the stream goes by), ``aware`` or ``agnostic``.
        margin: Added to the difference: how far behind still counts as near.
        adaptive: Whether the rows are those of docs/adaptive.md, all classes competing.
    """

    text: str
    source: str
    first: str
    second: str
    reading: str = "own"
    margin: float = 0.0
    adaptive: bool = False


def full(model: str) -> str:
    """Return the label of a rule that merges independent experts of all weights."""
    return f"full, base: {model}"


CLAIMS = [
    Claim(
        "Sequential experts merge better than independent ones, under MagMax",
        "2407.06322",
        "full, previous: magmax",
        full("magmax"),
    ),
    Claim("The same, told the task", "2407.06322", "full, previous: magmax", full("magmax"), "aware"),
    Claim(
        "The largest entries (MagMax) beat the mean of sequential experts",
        "2407.06322",
        "full, previous: magmax",
        "full, previous: weight_average",
    ),
    Claim(
        "Task vectors in tangent space add up better",
        "2305.12827",
        "linearized, base: task_arithmetic",
        full("task_arithmetic"),
    ),
    Claim(
        "The same, told the task", "2305.12827", "linearized, base: task_arithmetic", full("task_arithmetic"), "aware"
    ),
    Claim(
        "The mean of tangent models (TMC) beats the mean of others",
        "2307.08114",
        "linearized, base: weight_average",
        full("weight_average"),
    ),
    Claim(
        "LoRA linearized in its factors (L-LoRA) adds up better than LoRA, at the rate that is best for LoRA",
        "2310.04742",
        "linearized LoRA, base: task_arithmetic",
        "LoRA, base: task_arithmetic",
    ),
    Claim(
        "Resolving signs (TIES) beats adding up (task arithmetic)",
        "2306.01708",
        full("ties"),
        full("task_arithmetic"),
    ),
    Claim(
        "Dropping nine of ten entries at random (DARE) costs less than a point",
        "2311.03099",
        full("dare"),
        full("task_arithmetic"),
        margin=0.01,
    ),
    Claim("Singular vectors that do not interfere (TSV-M) beat TIES", "2412.00081", full("tsvm"), full("ties")),
    Claim("Equal singular values (Iso-C) beat TIES", "2502.04959", full("iso_c"), full("ties")),
    Claim("Iso-C beats TSV-M", "2502.04959", full("iso_c"), full("tsvm")),
    Claim(
        "Singular vectors in one basis for all tasks (DC-Merge) beat TSV-M",
        "2603.06242",
        full("dc_merge"),
        full("tsvm"),
    ),
    Claim(
        "A task-specific subspace beside the common one (Iso-CTS) beats Iso-C",
        "2502.04959",
        full("iso_cts"),
        full("iso_c"),
    ),
    Claim(
        "Scaling by depth (LiNeS) beats task arithmetic",
        "2410.17146",
        full("task_arithmetic, LiNeS"),
        full("task_arithmetic"),
    ),
    Claim("Inner products of features (RegMean) beat the mean", "2212.09849", full("regmean"), full("weight_average")),
    Claim("Fisher information beats the mean", "2111.09832", full("fisher"), full("weight_average")),
    Claim("The interference of task vectors, minimised (WUDI), beats TSV-M", "2503.08099", full("wudi"), full("tsvm")),
    Claim("Competition of parameters (PCB) beats TIES", "2410.02396", full("pcb"), full("ties")),
    Claim(
        "Orthogonal projections (OPCM) beat task arithmetic in a stream",
        "2501.09522",
        full("opcm"),
        full("task_arithmetic"),
    ),
    Claim(
        "A unified vector with masks (EMR), told the task, is within 2 points of the experts",
        "2405.17461",
        full("emr"),
        "experts, told the task",
        "aware",
        margin=0.02,
    ),
    Claim(
        "Masks of the sum (TALL), told the task, are within 2 points of the experts",
        "2405.07813",
        full("tall"),
        "experts, told the task",
        "aware",
        margin=0.02,
    ),
    Claim("Aligned LoRA factors (KnOTS) beat TIES on LoRA", "2410.19735", "LoRA, base: knots", "LoRA, base: ties"),
    Claim(
        "A pull to the base where its Fisher information is large (ITA) makes experts that average better",
        "2405.16350",
        "ITA, base: weight_average",
        full("weight_average"),
    ),
    Claim(
        "Training each expert as a part of the mean (IEL) makes experts that average better",
        "2405.16350",
        "IEL, base: weight_average",
        full("weight_average"),
    ),
    Claim("SAM makes experts that add up better", "2504.14662", "SAM, base: task_arithmetic", full("task_arithmetic")),
    Claim(
        "Fine-tuning attention alone makes experts that add up better",
        "2407.07089",
        "attention, base: task_arithmetic",
        full("task_arithmetic"),
    ),
    Claim(
        "Averages inside of a task (SWA) make experts that add up better",
        "1803.05407",
        "SWA, base: task_arithmetic",
        full("task_arithmetic"),
    ),
    Claim(
        "Fisher information helps along a stream (CoFiMA over CoMA)",
        "2312.08977",
        "full, merged, Fisher: cofima",
        "full, merged: wise_ft",
    ),
    Claim(
        "A share by the Fisher information along the line (BECAME) beats a fixed one (CoMA)",
        "2504.02666",
        "full, merged, line: became",
        "full, merged: wise_ft",
    ),
    Claim(
        "Merging along a stream (CoMA) beats sequential fine-tuning",
        "2312.08977",
        "full, merged: wise_ft",
        "sequential fine-tuning",
    ),
    Claim("Merged branches beat sequential fine-tuning", "2407.08699", "Branch-and-Merge", "sequential fine-tuning"),
    Claim(
        "A share chosen on validation (PAINT) beats a fixed one (CoMA)",
        "2208.05592",
        "full, best share: paint",
        "full, merged: wise_ft",
    ),
    Claim(
        "Learned coefficients (AdaMerging, on 10 kept images a class, not on test images) beat the best scale",
        "2310.02575",
        full("adamerging"),
        full("task_arithmetic"),
    ),
    Claim(
        "Learned soups (weights per layer, from labels of 10 kept images a class) beat the mean",
        "2203.05482",
        full("learned_soup"),
        full("weight_average"),
    ),
    Claim(
        "SMILE, without images, is within a point of WEMoE",
        "2408.10174",
        "weight_average+smile",
        "task_arithmetic+wemoe",
        margin=0.01,
        adaptive=True,
    ),
    Claim(
        "The mean with low-rank experts routed by subspace (SMILE) beats the mean",
        "2408.10174",
        full("weight_average+smile"),
        full("weight_average"),
    ),
    Claim(
        "LoRA vectors summed and tuned on ten images a class beat the sum with the best scale",
        "2311.02428",
        "LoRA, sum, tuned: task_arithmetic+tuned",
        "LoRA, base: task_arithmetic",
    ),
]


@dataclass(frozen=True)
class Found:
    """The paired differences of two rows over seeds.

    Attributes:
        by_stream: Differences by the name of the stream, where the rows have seeds in common.
    """

    by_stream: Mapping[str, Sequence[float]]

    @property
    def streams(self) -> dict[str, Interval]:
        """The mean difference on every stream."""
        return {name: interval_of(values) for name, values in self.by_stream.items()}

    def overall(self, level: float = 0.95) -> Interval:
        """Return the mean over the streams, each counting the same; those of one seed if there are no others."""
        known = list(self.by_stream.values())
        return mean_of_groups([one for one in known if len(one) > 1] or known, level=level)

    @property
    def verdict(self) -> str:
        """What the differences decide: the intervals of the streams and of their mean that exclude zero."""
        signs = {name: one.sign for name, one in self.streams.items()}
        decided = {*signs.values(), self.overall().sign} - {0}
        if len(decided) > 1:
            return "depends on the stream"
        if not decided:
            return "not decided here"
        word = "holds" if decided == {1} else "fails"
        where = [name for name, sign in signs.items() if sign]
        return word if self.overall().sign else f"{word} on {' and '.join(where)} alone"


def compared(claim: Claim, table: Mapping[tuple[str, str, str], Row]) -> Found:
    """Return the paired differences of a claim."""
    found: dict[str, list[float]] = {}
    if claim.adaptive:
        figures = json.loads(ADAPTIVE.read_text())
        for stream, name in ADAPTIVE_STREAMS.items():
            pairs = zip(*(figures[stream][one]["agnostic"] for one in (claim.first, claim.second)), strict=True)
            found[name] = [a - b + claim.margin for a, b in pairs]
        return Found(found)
    for stream, name in STREAMS.items():
        first, second = (table.get((stream, label, "")) for label in (claim.first, claim.second))
        if first is None or second is None:
            continue
        if differences := first.less(second, claim.reading):
            found[name] = [difference + claim.margin for difference in differences]
    return Found(found)
