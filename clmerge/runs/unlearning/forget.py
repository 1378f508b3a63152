"""Take tasks out of the merged models of a finished run, and measure what is left of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from clmerge.deploy.predictors import Merged, Predictor
from clmerge.evaluation.probes import ForgetControl, Measured, MembershipInference
from clmerge.merging import Merger
from clmerge.results.confusion import ModelRow
from clmerge.results.results import ZERO_SHOT
from clmerge.runs.comparison.refold import Refold
from clmerge.runs.stored_run import StoredRun
from clmerge.runs.unlearning.choice import Choice, choose
from clmerge.runs.unlearning.directions import deficiency, large_part, minus, moved, random_like, total
from clmerge.runs.unlearning.request import ASCENT_STEPS, Request
from clmerge.runs.unlearning.trained import ascended, memorised, relearning_steps
from clmerge.weights import apply_task_vector
from clmerge.weights.task_vector import State, TaskVector

StateOf = Callable[[State], State]
"""Returns weights by the module's names, of a vector that is added to theta_0."""

BEFORE, AFTER, NEVER = "before", "after", "never"


@dataclass
class Forgotten:
    """One merged model without the tasks.

    Attributes:
        name: Name of the merger.
        merger: The merger.
        state: Weights by the module's names; for a rule with a model per task, those for images of unknown task.
        how: What was done, in words.
        found: What was measured, in JSON types.
    """

    name: str
    merger: Merger
    state: State
    how: str
    found: dict[str, Any] = field(default_factory=dict)


class Forgetting:
    """Forget tasks of a finished run.

    Args:
        run: The run; its merged models are folded again from its bank.
        request: What is to be forgotten, checked by :func:`check_request`.
    """

    def __init__(self, run: StoredRun, request: Request) -> None:
        self.run, self.request = run, request
        self.last = len(run.tasks) - 1
        self.control = [task for task in range(len(run.tasks)) if task not in request.tasks]

    def forget(self, name: str, merger: Merger) -> Forgotten:
        """Forget the tasks in one merged model, and measure it before and after, beside the merge without the tasks.

        Args:
            name: Name of the merger.
            merger: The merger, with no task folded in.
        """
        run, request = self.run, self.request
        whole, never = Refold(run, {name: merger}), Refold(run, {name: merger})
        for task in range(len(run.tasks)):
            whole.fold(task)
        for task in self.control:
            never.fold(task)
        run.enter(self.last)
        before, without = whole.merge.predictor(name, run.module), never.merge.predictor(name, run.module)
        vectors: dict[str, State] = {BEFORE: whole.merge.merged_vector(name), NEVER: never.merge.merged_vector(name)}
        predictors: dict[str, Predictor] = {BEFORE: before, NEVER: without}
        found: dict[str, Any] = {}
        how = ""
        if request.method == "downdate":
            how = self._taken_out(whole, name)
            left = whole if not how else never
            how = how or "subtracted: what the tasks added to the sums of the rule was taken out of them"
            run.enter(self.last)
            vectors[AFTER] = left.merge.merged_vector(name)
            predictors[AFTER] = left.merge.predictor(name, run.module)
            whole = never  # whose running statistics are those of the other tasks
            if not merger.task_views:
                predictors[AFTER] = Merged(self._state(never, name, vectors[AFTER]))
        else:
            state_of = partial(self._state, whole, name)
            if request.method == "gradient_ascent":
                vectors[AFTER], choice = self._ascended(vectors[BEFORE], state_of)
                found["chosen"] = {"steps": int(choice.value)}
                found["validation"] = choice.told()
                how = "trained to answer wrongly on the training images of the tasks"
            elif request.method == "ssu":
                vectors[AFTER], found["requests"], steps = self._sequence(vectors[BEFORE], state_of)
                vectors |= steps
                how = "one task after the other: learned once more with salient gradients, and this movement subtracted"
            else:
                vectors[AFTER], chosen, validation = self._subtracted(vectors[BEFORE], state_of)
                found["chosen"] = {"coefficient": chosen}
                if validation is not None:
                    found["validation"] = validation.told()
                how = _SUBTRACTED[request.method]
            predictors |= {key: Merged(state_of(vectors[key])) for key in vectors if key not in predictors}
        found["difference"] = difference(vectors[AFTER], vectors[NEVER])
        rows = self._measured(name, predictors, vectors)
        for place, one in enumerate(found.get("requests", ())):
            one |= self._told(rows[AFTER if place == len(found["requests"]) - 1 else f"request {place}"])
        found |= {key: self._told(rows[key]) for key in (BEFORE, AFTER, NEVER)}
        if ZERO_SHOT in rows:
            found[ZERO_SHOT] = self._told(rows[ZERO_SHOT])
        found["privacy_leak"] = {key: _leak(rows[key], rows[NEVER]) for key in (BEFORE, AFTER)}
        if request.relearn and not merger.task_views:
            found["relearning_steps"] = {
                key: relearning_steps(run, predictor.state, request.tasks, request.relearn)
                for key, predictor in predictors.items()
                if key in (BEFORE, AFTER, NEVER) and isinstance(predictor, Merged)
            }
        state = self._state(whole, name, vectors[AFTER])
        return Forgotten(name, merger, state, how, found)

    def _state(self, refold: Refold, name: str, vector: State) -> State:
        return refold.merge.state_with(vector, self.run.module, merger=name)

    def _taken_out(self, whole: Refold, name: str) -> str:
        """Take the tasks out of a merger; return why the others were merged anew instead, or nothing."""
        merger = whole.merge.mergers[name]
        anew = "merged anew from the vectors of the other tasks"
        if not merger.removable:
            return f"{anew}: the rule cannot take tasks out"
        if merger.requires_score or merger.requires_gradient:
            return f"{anew}: the rule goes by images, which it saw when the tasks were in it"
        try:
            for task in self.request.tasks:
                whole.take_out(task)
        except ValueError as error:
            return f"{anew}: {error}"
        return ""

    def _subtracted(self, merged: State, state_of: StateOf) -> tuple[TaskVector, float, Choice | None]:
        """Subtract a direction from a merged vector, as far as the control allows."""
        run, request = self.run, self.request
        vectors = [moved(run, task) for task in request.tasks]
        if request.method == "negate":
            direction = total(vectors)
        elif request.method == "ext_sub":
            direction = deficiency(merged, vectors)
        elif request.method == "ethos":
            direction = large_part(run.base, merged, vectors)
        else:
            direction = random_like(total(vectors), seed=run.seed)
        return self._as_far_as_allowed(merged, direction, request.tasks, self.control, state_of)

    def _as_far_as_allowed(
        self,
        merged: State,
        direction: State,
        forget: Sequence[int],
        control: Sequence[int],
        state_of: StateOf,
    ) -> tuple[TaskVector, float, Choice | None]:
        tried = self.request.tried
        if len(tried) == 1:
            return minus(merged, tried[0], direction), tried[0], None
        choice = self._choose(tried, lambda value: state_of(minus(merged, value, direction)), forget, control)
        return minus(merged, choice.value, direction), choice.value, choice

    def _choose(
        self,
        values: Sequence[float],
        candidate: Callable[[float], State],
        forget: Sequence[int],
        control: Sequence[int],
    ) -> Choice:
        request = self.request
        what = (
            "steps of gradient_ascent" if request.method == "gradient_ascent" else f"coefficients of {request.method}"
        )
        return choose(
            self.run,
            values,
            candidate,
            forget=forget,
            control=control,
            at_least=request.at_least,
            memory=request.memory,
            what=what,
        )

    def _ascended(self, merged: State, state_of: StateOf) -> tuple[State, Choice]:
        request = self.request
        path = [merged, *ascended(self.run, state_of(merged), request.tasks, request.steps or ASCENT_STEPS)]
        steps = [float(step) for step in range(1, len(path))]
        choice = self._choose(steps, lambda step: state_of(path[int(step)]), request.tasks, self.control)
        return path[int(choice.value)], choice

    def _sequence(self, merged: State, state_of: StateOf) -> tuple[State, list[dict[str, Any]], dict[str, State]]:
        """Forget one task after the other; return the vector, what was done at each, and the vectors in between."""
        run, request = self.run, self.request
        told: list[dict[str, Any]] = []
        between: dict[str, State] = {}
        for place, task in enumerate(request.tasks):
            learned = memorised(run, state_of(merged), task, request.steps, random_labels=request.random_labels)
            direction = {name: tensor - merged[name].to(tensor.dtype) for name, tensor in learned.items()}
            merged, coefficient, choice = self._as_far_as_allowed(merged, direction, [task], self.control, state_of)
            one: dict[str, Any] = {"task": run.tasks[task].name, "coefficient": coefficient}
            told.append(one if choice is None else one | {"validation": choice.told()})
            if place < len(request.tasks) - 1:
                between[f"request {place}"] = merged
        return merged, told, between

    def _measured(
        self, name: str, predictors: Mapping[str, Predictor], vectors: Mapping[str, State]
    ) -> dict[str, ModelRow]:
        """Evaluate all models on the test images, once."""
        run = self.run
        run.enter(self.last)
        models = dict(predictors)
        if run.module.head.open_vocabulary:
            models[ZERO_SHOT] = Merged(self._zero_shot())
        dense = {
            key: partial(apply_task_vector, run.base, vector)
            for key, vector in vectors.items()
            if isinstance(models[key], Merged)
        }
        label = f"{run.name}: {name} before and after, test images"
        return run.evaluate_again(label, models, self.last, probes=self.request.all_probes, weights=dense)

    def _zero_shot(self) -> State:
        return self.run.weights_with({name: tensor * 0 for name, tensor in self.run.bank[0].items()})

    def _told(self, row: ModelRow) -> dict[str, Any]:
        """Return what was measured of a model, in JSON types."""
        probes = row["probes"]
        forget = probes[ForgetControl.name]
        assert isinstance(forget.n, Mapping)
        return {
            "forget": forget.value,
            "control": forget.values["control"],
            "per_task": list(forget.per_task),
            "n": {"forget": forget.n["value"], "control": forget.n["control"]},
            "probes": {name: found.to_dict() for name, found in probes.items() if name != ForgetControl.name},
        }


_SUBTRACTED = {
    "negate": "subtracted: a multiple of the vectors of the tasks",
    "ext_sub": "subtracted: a multiple of what the vectors of the tasks do not share with the merged vector",
    "ethos": "subtracted: a multiple of what is large of the vectors in the basis of the merged weights",
    "random_vector": "subtracted: a multiple of noise as long as the vectors of the tasks, a baseline",
}


def difference(after: State, never: State) -> dict[str, Any]:
    """Return how far a merged vector is from that of the other tasks alone.

    Args:
        after: The vector.
        never: That of the merge in which the tasks never were.

    Returns:
        ``max_abs``, ``relative`` (as a share of the largest entry of ``never``) and whether they are ``bitwise`` equal.
    """
    largest = max((float(tensor.abs().max()) for tensor in never.values() if tensor.numel()), default=0.0)
    gaps = (
        float((after[name].double() - tensor.double()).abs().max()) for name, tensor in never.items() if tensor.numel()
    )
    gap = max(gaps, default=0.0)
    equal = all(
        after[name].dtype == tensor.dtype and bool((after[name] == tensor).all()) for name, tensor in never.items()
    )
    return {"max_abs": gap, "relative": gap / largest if largest else (0.0 if not gap else None), "bitwise": equal}


def _leak(row: ModelRow, never: ModelRow) -> float | None:
    """Return by how many percent the attack on members works better than on the model that never saw the tasks."""
    one, other = (_attack(each) for each in (row, never))
    return (
        100 * (one.value - other.value) / other.value if one is not None and other is not None and other.value else None
    )


def _attack(row: ModelRow) -> Measured | None:
    return row["probes"].get(MembershipInference.name)
