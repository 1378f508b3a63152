"""Which merger when: advice that rests on rows, and what `clmerge report` knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from claims import Claim, compared, full
from collect import READINGS
from plan import CLOSED, FREE, MEASURED
from rows import STREAMS, Row

EVIDENCE = Path(__file__).resolve().parents[2] / "clmerge" / "report" / "evidence.json"
Table = Mapping[tuple[str, str, str], Row]


@dataclass(frozen=True)
class Advice:
    """What to take under a condition, and the comparison that speaks for it.

    Attributes:
        condition: What somebody has, or wants.
        take: What to take, or what to know.
        claim: The rows that are compared.
    """

    condition: str
    take: str
    claim: Claim


def _advice(condition: str, take: str, first: str, second: str, reading: str = "own") -> Advice:
    return Advice(condition, take, Claim("", "", first, second, reading))


ADVICE = [
    _advice(
        "All classes compete at the end, and a few images of every class may be kept",
        "tune the head of the merged model on them (`SampleTuning`) before you look for a better "
        "rule; on Caltech not shown to help",
        full("weight_average+tuned"),
        full("weight_average"),
        "agnostic",
    ),
    _advice(
        "No time to fine-tune at all",
        "class means on frozen features (`simple_cil`) are the number to beat where all classes compete",
        "class means, frozen",
        full("tsvm"),
        "agnostic",
    ),
    _advice(
        "The same, and the task of every image is known",
        "class means are ahead of every single set of merged weights on the grey streams, here of `ACTMat`",
        "class means, frozen",
        full("actmat"),
        "aware",
    ),
    _advice(
        "The task of every image is known when the model is used",
        "keep a mask for every task beside one merged vector: `TALL` (together as large as the "
        "experts), or `EMR` (two thirds of it)",
        full("tall"),
        full("tsvm"),
        "aware",
    ),
    _advice(
        "The task is known, and one set of weights must do",
        "`ACTMat`, which holds six times the model, with the ridge chosen on validation images",
        full("actmat"),
        full("tsvm"),
        "aware",
    ),
    _advice(
        "The same, with accumulators no larger than twice the model",
        "`TSVM`; `DCMerge` and `IsoC` are not told apart from it",
        full("tsvm"),
        full("task_arithmetic"),
        "aware",
    ),
    _advice(
        "You choose where a task starts, and the task of every image will be known",
        "from the previous expert (`start_policy: previous`) on streams like the grey ones; compare first",
        "full, previous: tsvm",
        full("tsvm"),
        "aware",
    ),
    _advice(
        "You choose where a task starts, and all classes will compete",
        "from the base (`start_policy: base`), with the mean, the sum or `TIES`; `MagMax` was better "
        "from the previous expert on 5 tasks",
        full("weight_average"),
        "full, previous: weight_average",
        "agnostic",
    ),
    _advice(
        "Training images may be looked at once more, at the end of their task",
        "`RegMean` is not shown to be better than the mean, nor is `Fisher` (see the claims)",
        full("regmean"),
        full("weight_average"),
    ),
    _advice(
        "Fine-tuning may take twice as long",
        "tangent space, if you merge by a sum; `TIES` and `MagMax` are worse there on 5 tasks",
        "linearized, base: task_arithmetic",
        full("task_arithmetic"),
        "aware",
    ),
    _advice(
        "Adapters must be small",
        "LoRA, with any rule; that it costs points against all weights cannot be ruled out",
        "LoRA, base: tsvm",
        full("tsvm"),
    ),
    _advice(
        "A low-rank part of every expert may be kept, and no image",
        "route them by the subspace that an input lies in (`Smile`)",
        full("weight_average+smile"),
        full("weight_average"),
    ),
    _advice(
        "You would rather regularize a sequence than merge",
        "rather merge: `LwF`, its strength chosen on validation images, is level with `TSVM` on 5 "
        "tasks and far behind on 20",
        "LwF",
        full("tsvm"),
    ),
    _advice(
        "Some hundred old images may be kept",
        "tune the head on them after merging; replay of 500 is nowhere better for certain, and class means keep none",
        full("weight_average+tuned"),
        "experience replay, 500 images",
        "agnostic",
    ),
]


def evidence(table: Table) -> dict[str, Any]:
    """Return which rule was ahead of which, by reading, for experts of one base model.

    A rule is ahead of another if the 99 % interval of their paired difference, averaged over the streams, lies above
    zero, and the 95 % interval of no stream below it. There are hundreds of pairs: 95 % would let in a dozen by chance.
    """
    from clmerge.merging import registered_mergers

    names = [rule if isinstance(rule, str) else rule["class_path"] for rule in (*FREE, *MEASURED, *CLOSED)]
    labels = {name: full(registered_mergers()[name].name) for name in names}
    leads: dict[str, list[dict[str, Any]]] = {}
    for short, reading in READINGS.items():
        for first, second in permutations(names, 2):
            found = compared(Claim("", "", labels[first], labels[second], short), table)
            whole = len(found.by_stream) == len(STREAMS) and all(len(one) > 1 for one in found.by_stream.values())
            if whole and found.overall(0.99).sign > 0 and found.verdict == "holds":
                mean = round(found.overall().mean, 4)
                leads.setdefault(reading, []).append({"ahead": first, "of": second, "mean": mean})
    return {"streams": list(STREAMS.values()), "leads": leads}
