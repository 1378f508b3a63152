"""What is to be forgotten, and how."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from clmerge.evaluation.probes import ForgetControl, MembershipInference, Probe, check_probes
from clmerge.merging import Merger
from clmerge.names import did_you_mean
from clmerge.runs.comparison.refold import check_mergers
from clmerge.runs.stored_run import StoredRun

Method: TypeAlias = Literal["downdate", "negate", "ext_sub", "ethos", "random_vector", "gradient_ascent", "ssu"]
METHODS: tuple[str, ...] = get_args(Method)
TWENTIETHS = tuple(step / 20 for step in range(21))
ASCENT_STEPS = 20


@dataclass(frozen=True)
class Request:
    """What is to be forgotten, and how.

    Attributes:
        tasks: Indices of the tasks, in the order in which they are asked for.
        method: How they are forgotten.
        coefficients: Coefficients to choose from on validation images; one value is taken as it is.
        at_least: Share of the merged model's accuracy on the other tasks that must stay, on validation images.
        steps: Steps of training, for the methods that train; None: 20 of gradient ascent, one epoch of ``ssu``.
        random_labels: Factor of the loss of random labels in ``ssu``.
        relearn: Images per task to forget that are learned again, to see how fast; 0: none.
        probes: Further probes.
        memory: Bytes of weights that are held at a time while coefficients are tried.
    """

    tasks: Sequence[int]
    method: Method = "downdate"
    coefficients: Sequence[float] = ()
    at_least: float = 0.95
    steps: int | None = None
    random_labels: float = 0.5
    relearn: int = 0
    probes: Sequence[Probe] = field(default_factory=tuple)
    memory: int = 2**32

    @property
    def settings(self) -> dict[str, Any]:
        """What the method goes by, in JSON types."""
        found: dict[str, Any] = {}
        if self.method == "downdate":
            return found
        if self.method == "gradient_ascent":
            found["steps"] = self.steps or ASCENT_STEPS
        else:
            found["coefficients"] = list(self.tried)
        if self.method == "ssu":
            found |= {"steps": self.steps or "one epoch", "random_labels": self.random_labels, "deviations": 1.0}
        if self.chooses:
            found["at_least"] = self.at_least
        return found

    @property
    def tried(self) -> Sequence[float]:
        """The coefficients that are tried."""
        return self.coefficients or ((1.0,) if self.method == "ssu" else TWENTIETHS)

    @property
    def chooses(self) -> bool:
        """Whether something is chosen on validation images."""
        return self.method == "gradient_ascent" or (self.method != "downdate" and len(self.tried) > 1)

    @property
    def all_probes(self) -> list[Probe]:
        """The probes of the models: those of unlearning, and further ones, which replace those of their name."""
        tasks = list(self.tasks)
        own: list[Probe] = [ForgetControl(tasks), MembershipInference(tasks)]
        given = {probe.name for probe in self.probes}
        return [*(probe for probe in own if probe.name not in given or probe.name == ForgetControl.name), *self.probes]


def check_request(run: StoredRun, mergers: dict[str, Merger], request: Request) -> None:
    """Refuse what cannot be forgotten, before anything is computed.

    Args:
        run: The run.
        mergers: Mergers by name.
        request: What is to be forgotten.

    Raises:
        ValueError: If a number is out of range, no task is left, or a merger, a probe or the method does not fit.
    """
    tasks = list(request.tasks)
    if len({*tasks}) < len(tasks):
        raise ValueError(f"expected different tasks to forget, got {run.tasks[_repeated(tasks)].name!r} twice")
    if len(tasks) == len(run.tasks):
        raise ValueError(f"expected a task that is left, got all {len(tasks)} to forget")
    if not 0 <= request.at_least <= 1:
        raise ValueError(f"expected --at-least as a share from 0 to 1, got {request.at_least}")
    if (request.steps is not None and request.steps < 1) or request.relearn < 0:
        raise ValueError(
            f"expected 1 step or more and 0 images or more to learn again, got {request.steps} and {request.relearn}"
        )
    if request.random_labels < 0:
        raise ValueError(f"expected --random-labels of 0 or more, got {request.random_labels}")
    if request.coefficients and request.method in ("downdate", "gradient_ascent"):
        raise ValueError(f"expected no --coefficients for {request.method}, which has none")
    if request.steps is not None and request.method not in ("gradient_ascent", "ssu"):
        raise ValueError(f"expected --steps for gradient_ascent or ssu, which train, got {request.method}")
    if request.chooses and not run.has_validation:
        raise ValueError(
            f"expected validation images of every task to choose how far {request.method} goes, got a run of a stream "
            "that holds none out: train with stream.val_fraction above 0"
            + ("" if request.method == "gradient_ascent" else ", or give one value in --coefficients")
        )
    check_mergers(run, mergers)
    check_probes(request.all_probes, run.stream)
    for name, merger in mergers.items():
        if merger.task_views and request.method != "downdate":
            raise ValueError(
                f"expected a merger with one set of weights for --method {request.method}, got {name}, which has a "
                "model for every task; --method downdate takes tasks out of it"
            )


def named_tasks(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the indices of tasks that are given by name or index, in their order.

    Args:
        names: Names of all tasks.
        wanted: Names or indices.

    Raises:
        ValueError: If there is no such task; the nearest name is given.

    Example:
        >>> named_tasks(["cats", "dogs"], ["dogs", "0"])
        [1, 0]
    """
    found = []
    for word in wanted:
        if word in names:
            found.append(list(names).index(word))
        elif word.isdecimal() and int(word) < len(names):
            found.append(int(word))
        else:
            known = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
            raise ValueError(f"expected one of the tasks {known} to forget, got {word!r}{did_you_mean(word, names)}")
    return found


def _repeated(tasks: Sequence[int]) -> int:
    return next(task for task in tasks if list(tasks).count(task) > 1)
