"""The contract of every merge rule: an accumulator that folds task vectors in, one task at a time."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from clmerge.merging.accumulators import SlotDtypes, Slots, allocate, copied, device_of, float_dtype, slot_blocks, widen
from clmerge.merging.checks import (
    Shapes,
    check_base,
    check_finite,
    check_shapes,
    is_finite,
    num_entries,
    read_shapes,
)
from clmerge.merging.configured import Configured
from clmerge.merging.identity import examine, with_statistics
from clmerge.merging.kept_beside import Join, added, duplicate
from clmerge.merging.scope import Scope, Scoped
from clmerge.merging.sparsify import Sparsifier
from clmerge.merging.step import PIECE, Score, Statistics, Step
from clmerge.weights.bank import TaskVectorBank
from clmerge.weights.task_vector import State, TaskVector


class Merger(Configured, Scoped, ABC):
    """Merge task vectors as a streaming reduction with constant memory.

    ``compute()`` after t updates is the rule applied to tasks 1..t, for every t. A subclass keeps its
    constructor arguments under their own names, says which accumulators every parameter has, and writes two
    short functions: ``_fold_block`` takes a piece of a task vector in, ``_read_block`` reads the merged piece
    out. Subclasses are the registry: a class that exists is found by ``registered_mergers``.

    Attributes:
        name: Short name in results and file names.
        summary: One line for the table of mergers.
        source: arXiv id of the paper.
        exact_online: Whether ``compute()`` equals the batch rule at every t with a state that does not grow.
        order_free: Whether the order of the tasks does not matter; only then can accumulators be joined.
        removable: Whether a task can be taken out again: the rule is a group, ``downdate`` inverts ``update``. Such
            a rule multiplies what it adds to its accumulators by ``step.sign``.
        keeps_vectors: Whether every task vector is kept, in memory or in a bank (``use_bank``).
        reading_bytes: What ``compute()`` of such a rule takes per parameter, beside the result and the task vectors of
            one parameter.
        requires: What ``update`` needs beside the vector: ``"score"``, or names of statistics.
        scope: Whether parameters can be merged one at a time; see ``Scoped``.
        tasks: Index of every merged task, in order of arrival.
        num_tasks: How many there are.
        base: Fingerprint of the base model, once known.
    """

    summary: str = ""
    source: str = ""
    exact_online: bool = True
    order_free: bool = True
    removable: bool = False
    keeps_vectors: bool = False
    reading_bytes: int = 0
    requires: frozenset[str] = frozenset()
    scope: Scope = "parameter"
    _sees_model = frozenset({"_plan", "_overview", "_after_update", "_fold_in", "compute"})

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self.base: str | None = None
        self._identities: dict[int, str] = {}
        self._shapes: Shapes = {}
        self._slots: dict[str, Slots] = {}
        self._kept_beside: dict[str, tuple[Any, Join]] = {}

    # What a rule defines

    @abstractmethod
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        """Name the accumulators of a parameter, and their dtypes after ``num_tasks`` tasks."""

    def _plan(self, vector: State, step: Step) -> Any:
        """Compute what folding needs to know of the whole vector; it may fail, and changes nothing."""
        return None

    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        """Fold one parameter in; by default block by block."""
        dtype = float_dtype(slots)
        for block, (piece,) in slot_blocks(slots, tau):
            self._fold_block(block, piece.to(dtype), step, plan)

    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        """Fold one flat piece of a parameter into the same piece of its accumulators, in place."""
        raise TypeError(f"{type(self).__name__} defines neither _fold nor _fold_block")

    def _after_update(self, step: Step, plan: Any) -> None:
        """Update what the rule keeps beside the per-parameter accumulators."""

    def _overview(self) -> Any:
        """Compute what reading needs to know of the whole state."""
        return None

    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        """Read one merged parameter; by default block by block."""
        shape = self._shapes[name]
        merged = torch.empty(shape, dtype=float_dtype(slots), device=device_of(slots))
        for block, (piece,) in slot_blocks(slots, merged):
            piece.copy_(self._read_block(block, overview))
        return merged

    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        """Read one flat merged piece, scale included."""
        raise TypeError(f"{type(self).__name__} defines neither _read nor _read_block")

    def _join_block(self, slots: Slots, other: Slots) -> None:
        """Join the accumulators of two streams; by default they are sums."""
        for slot, accumulator in slots.items():
            accumulator.add_(other[slot])

    def _keep(self, attribute: str, *, join: Join = None) -> None:
        """Declare what the rule keeps beside the accumulators: it is saved, loaded, reset, moved and joined.

        Args:
            attribute: Name of an attribute, whose present value is that before the first update: a number, a tensor, or
                a dictionary of such by strings.
            join: ``"sum"`` adds the values of two accumulators, number by number; else what returns the joined value;
                None where the rule cannot be joined.
        """
        self._kept_beside[attribute] = (duplicate(getattr(self, attribute)), join)

    def _extras(self) -> dict[str, Any]:
        """Return what the rule keeps beside the accumulators, as primitives and copies of tensors."""
        return {attribute.strip("_"): duplicate(getattr(self, attribute)) for attribute in self._kept_beside}

    def _load_extras(self, extras: dict[str, Any]) -> None:
        """Take back what ``_extras`` returned; ``{}`` is the state before the first update."""
        for attribute, (initial, _) in self._kept_beside.items():
            setattr(self, attribute, duplicate(extras.get(attribute.strip("_"), initial), self._device))

    def _join_extras(self, other: Self) -> None:
        """Join what the rule keeps beside the accumulators."""
        for attribute, (_, join) in self._kept_beside.items():
            ours, theirs = getattr(self, attribute), getattr(other, attribute)
            if join is not None:
                setattr(self, attribute, added(ours, theirs) if join == "sum" else join(ours, theirs))

    def _held(self) -> Mapping[str, Slots]:
        """Return the accumulators by parameter, for reading."""
        return self._slots

    def _sparsify_with(self, sparsifiers: list[Sparsifier]) -> bool:
        """Take over what a pipeline does to task vectors; False if the rule leaves that to the pipeline."""
        return False

    # What every rule has

    @property
    def tasks(self) -> tuple[int, ...]:
        """Index of every merged task, in order of arrival."""
        return tuple(self._identities)

    @property
    def num_tasks(self) -> int:
        """How many tasks are merged."""
        return len(self._identities)

    def matrices(self, shapes: Shapes) -> list[str]:
        """Return lines, for printing, that say what the rule decomposes as matrices; none for rules that do not.

        Args:
            shapes: Shapes of the parameters by name.
        """
        return []

    def update(
        self,
        task_vector: State,
        *,
        task: int | None = None,
        base: str | None = None,
        score: Score | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Fold one task vector in. It is neither written to nor kept.

        Args:
            task_vector: Parameter name -> tensor, any floating dtype, the same names and shapes every time.
            task: Index of the task: it names the task in this accumulator, seeds random rules, and finds settings per
                task. Default: one more than the largest so far, 0 at first.
            base: Fingerprint of the base model (``clmerge.weights.fingerprint``). Default: not checked.
            score: Held-out accuracy of theta0 + vector, for rules whose ``requires`` names it.
            statistics: What else ``requires`` names, for example ``{"fisher": {name: tensor}}``.

        Raises:
            TypeError: If ``task_vector`` is not a mapping of names to tensors.
            ValueError: If it holds NaN or Inf, names, shapes or the base differ from before, the task is merged
                already, or something the rule requires is missing. The state is then as it was.
        """
        task = max(self.tasks, default=-1) + 1 if task is None else task
        if task in self._identities:
            raise ValueError(
                f"expected a task that is not merged yet, got task {task} again (merged are {_listed(self.tasks)}); "
                "give every task vector an index of its own"
            )
        given = Step(task=task, position=self.num_tasks, score=score, statistics=statistics or {})
        self._change(task_vector, base, given)

    def update_piece(self, piece: State, task: int, *, statistics: Statistics | None = None) -> None:
        """Fold in one parameter, or a flat piece of one, of a task vector that is brought piece by piece.

        For walkers over vectors that are not in memory: nothing ties the piece to the whole vector, so the accumulator
        can neither be joined nor take it out again. ``merge_out_of_core`` is such a walker.

        Args:
            piece: Name -> tensor.
            task: Index of the task.
            statistics: What else ``requires`` names.

        Raises:
            ValueError: As for ``update``.
        """
        given = Step(task=task, position=self.num_tasks, statistics=statistics or {}, identity=PIECE)
        self._change(piece, None, given)

    def downdate(
        self,
        task_vector: State,
        *,
        task: int | None = None,
        base: str | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Take a task vector out again: the inverse of the ``update`` that folded it in.

        Args:
            task_vector: The vector as it was given to ``update``.
            task: Its task index then. Default: that of the task with this vector.
            base: Fingerprint of the base model. Default: not checked.
            statistics: What was given beside it then.

        Raises:
            TypeError: If the rule cannot forget single tasks.
            RuntimeError: If no task is merged.
            ValueError: As for ``update``, and if this is not a vector that was merged; the state is then as it was.
        """
        if not self.removable:
            raise TypeError(f"expected a rule that can take tasks out again, got {self!r}; merge the others anew")
        if not self.num_tasks:
            raise RuntimeError(f"expected a merged task to take out of {self!r}, got none")
        given = Step(
            task=-1 if task is None else task, position=self.num_tasks - 1, statistics=statistics or {}, sign=-1
        )
        self._change(task_vector, base, given)

    def task_view(self, task: int) -> TaskVector:
        """Return what is added to theta0 for one task, for rules that keep a mask per task.

        Args:
            task: Index of the task, as it was given to ``update``.

        Raises:
            TypeError: If the rule has one merged model for all tasks.
        """
        raise TypeError(f"expected a rule with a mask per task, got {self!r}; use compute()")

    def compute(self) -> TaskVector:
        """Return what is added to theta0 for the tasks merged so far, scale included.

        Returns:
            Fresh tensors by name, float32 (float64 after float64 vectors), where the accumulators live.

        Raises:
            RuntimeError: If nothing was merged yet, or the merged vector overflows.
        """
        if not self.num_tasks:
            raise RuntimeError(f"expected at least one update() before compute() of {type(self).__name__}, got none")
        with torch.inference_mode(False), torch.no_grad():
            overview = self._overview()
            merged = {name: self._read(name, slots, overview) for name, slots in self._held().items()}
        for name, tensor in merged.items():
            if not is_finite(tensor):
                raise RuntimeError(
                    f"expected finite sums, got an overflow in {name!r} of {self!r}; scale the task vectors "
                    "down or use float64"
                )
        return merged

    def merge_state(self, other: "Merger") -> None:
        """Join another accumulator of the same rule, as if ``other``'s task vectors had come after these.

        Args:
            other: A merger of the same class and settings, over the same parameters; it is not changed.

        Raises:
            RuntimeError: If the rule depends on the order of tasks or the settings differ.
            TypeError: If ``other`` is another rule.
            ValueError: If base model, names or shapes differ, or both have merged a task of the same index.
        """
        if type(other) is not type(self):
            raise TypeError(f"expected another {type(self).__name__} to join, got {type(other).__name__}")
        if other.settings() != self.settings():
            raise RuntimeError(f"expected the same settings to join two mergers, got {self!r} and {other!r}")
        if not self.order_free:
            raise RuntimeError(
                f"expected a rule that does not depend on the order of tasks, got {self!r}; "
                "update one merger with the task vectors in order instead"
            )
        check_base(other.base, self.base, "a merger")
        if not other.num_tasks:
            return
        if both := sorted(self._identities.keys() & other._identities.keys()):
            raise ValueError(
                f"expected to join mergers of different tasks, got two that both hold {_listed(both)}; give every task "
                "an index of its own: update(vector, task=...)"
            )
        if self.num_tasks:
            check_shapes(other._shapes, self._shapes, "a merger")
            self._check_dtypes(other._float_dtypes(), "a merger")
        with torch.inference_mode(False), torch.no_grad():
            self._join(other)
        self._shapes, self.base = dict(self._shapes or other._shapes), self.base or other.base
        self._identities = self._identities | other._identities

    def use_bank(self, bank: TaskVectorBank) -> None:
        """Read task vectors from a bank where the rule would keep copies; nothing changes for rules that keep none.

        State and checkpoints then hold their fingerprints alone. The caller stores every vector in the bank, under the
        task index of its ``update``, before the next ``compute()``.

        Args:
            bank: Where the vectors are.
        """

    def reset(self) -> None:
        """Forget every task; settings and the device asked for with ``to`` stay."""
        self._identities, self.base = {}, None
        self._shapes, self._slots = {}, {}
        self._load_extras({})

    def to(self, device: torch.device | str) -> Self:
        """Keep the accumulators on this device from now on. Default: where the first task vector lives.

        Args:
            device: Where they go.
        """
        self._device = torch.device(device)
        self._slots = copied(self._slots, self._device)
        for attribute in self._kept_beside:
            setattr(self, attribute, duplicate(getattr(self, attribute), self._device))
        return self

    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        """Return the bytes that the accumulators' tensors take for task vectors of float32 or less.

        Args:
            shapes: Shapes of the merged parameters by name.
            num_tasks: Task vectors merged.

        Example:
            >>> from clmerge.merging import TIES
            >>> TIES().state_size({"w": (100, 10)}, num_tasks=8)
            12000
        """
        dtypes = self._slot_dtypes(num_tasks).values()
        return num_entries(shapes) * sum((dtype or torch.float32).itemsize for dtype in dtypes)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: primitives and copies of tensors, safe to load weights-only."""
        return {
            "class": type(self).__name__,
            "settings": self.settings(),
            "tasks": {str(task): identity for task, identity in self._identities.items()},
            "base": self.base,
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "slots": copied(self._slots),
            "extras": self._extras(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, bit for bit.

        Args:
            state: What ``state_dict`` of a merger of the same class and settings returned.

        Raises:
            ValueError: If it belongs to another rule or other settings, or tensors are missing. The state is
                then as it was.
        """
        for key, expected in (("class", type(self).__name__), ("settings", self.settings())):
            if state.get(key) != expected:
                raise ValueError(f"expected the state of {self!r}, got one with {key} {state.get(key)!r}")
        if "tasks" not in state:
            raise ValueError(
                f"expected the tasks merged in the state of {self!r}, got one of another version of clmerge"
            )
        identities = {int(task): str(identity) for task, identity in state["tasks"].items()}
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        wanted = set(self._slot_dtypes(len(identities)))
        for name, shape in shapes.items():
            found = {slot: tuple(tensor.shape) for slot, tensor in state["slots"].get(name, {}).items()}
            if found != dict.fromkeys(wanted, shape):
                raise ValueError(
                    f"expected accumulators {sorted(wanted)} of shape {shape} for {name!r} in the state of "
                    f"{self!r}, got {found}; the checkpoint is damaged or of another version"
                )
        with torch.inference_mode(False):
            slots = copied(state["slots"], self._device)
        self._load_extras(state["extras"])
        self._slots, self._shapes = slots, shapes
        self._identities, self.base = identities, state["base"]

    # How it works inside

    def _change(self, vector: State, base: str | None, step: Step) -> None:
        """Check a task vector and what comes with it, then fold it in or take it out."""
        shapes = read_shapes(vector)
        source = "the task vector" if step.task < 0 else f"the task vector of task {step.task}"
        if self.num_tasks:
            check_shapes(shapes, self._shapes, source)
        check_base(base, self.base, source)
        if "score" in self.requires and step.score is None:
            raise ValueError(
                f"expected a held-out metric for {type(self).__name__}, got none; pass score=... to update()"
            )
        if missing := sorted(self.requires - {"score"} - step.statistics.keys()):
            raise ValueError(
                f"expected statistics {missing} for {type(self).__name__} beside {source}, got "
                f"{sorted(step.statistics)}; pass statistics={{{missing[0]!r}: ...}}"
            )
        # Accumulators made in inference mode could never be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._check_dtypes({name: vector[name].dtype for name in vector}, source)
            if step.identity:
                check_finite(vector)
            else:
                read = {name: step.statistics[name] for name in self.requires if name in step.statistics}
                identity, largest = examine(vector)
                step = replace(step, identity=with_statistics(identity, read), largest=largest)
            if step.sign < 0:
                step = replace(step, task=self._merged_task(step))
                if self.num_tasks == 1:
                    self.reset()
                    return
            self._take(vector, shapes, base, step)

    def _merged_task(self, step: Step) -> int:
        """Return which task is to be taken out, or refuse a vector that was never merged."""
        matching = [task for task, identity in self._identities.items() if identity == step.identity]
        if step.task in matching or (step.task < 0 and len(matching) == 1):
            return step.task if step.task >= 0 else matching[0]
        if step.task < 0 and matching:
            raise ValueError(
                f"expected one task with this vector, got {_listed(matching)}; say which to take out: task=..."
            )
        where = f"the vector and statistics of task {step.task}" if step.task >= 0 else "those of a merged task"
        raise ValueError(
            f"expected {where} to take out of {self!r} (merged are {_listed(self.tasks)}), got others; give what "
            "update() was given"
        )

    def _take(self, vector: State, shapes: Shapes, base: str | None, step: Step) -> None:
        """Fold a checked task vector in, or take it out, and write down whose it is."""
        plan = self._fold_in(vector, shapes, step)
        self._shapes, self.base = shapes, self.base or base
        if step.sign > 0:
            self._identities[step.task] = step.identity
        else:
            del self._identities[step.task]
        self._after_update(step, plan)

    def _fold_in(self, vector: State, shapes: Shapes, step: Step) -> Any:
        """Fold a checked task vector in, or take it out; return the plan."""
        plan = self._plan(vector, step)
        dtypes = self._slot_dtypes(step.position + 1)
        slots = self._slots or allocate(vector, dtypes, self._device)
        widen(slots, dtypes)
        for name, accumulators in slots.items():
            self._fold(name, accumulators, vector[name].detach().to(device_of(accumulators)), step, plan)
        self._slots = slots
        return plan

    def _float_dtypes(self) -> dict[str, torch.dtype]:
        return {name: float_dtype(slots) for name, slots in self._slots.items()}

    def _check_dtypes(self, dtypes: dict[str, torch.dtype], source: str) -> None:
        """Refuse what would lose precision: float64 for an accumulator that began in float32."""
        for name, dtype in self._float_dtypes().items():
            if dtypes[name] == torch.float64 != dtype:
                raise ValueError(
                    f"expected {name!r} in float32 or less as in the first task vector, got float64 in "
                    f"{source}; convert all task vectors to one dtype"
                )

    def _join(self, other: Self) -> None:
        if self.num_tasks:
            widen(self._slots, self._slot_dtypes(self.num_tasks + other.num_tasks))
            for name, slots in self._slots.items():
                order, dtype = list(slots), float_dtype(slots)
                theirs = [other._slots[name][slot].to(device_of(slots)) for slot in order]
                for block, pieces in slot_blocks(slots, *theirs):
                    cast = (piece.to(dtype) if piece.is_floating_point() else piece for piece in pieces)
                    self._join_block(block, dict(zip(order, cast, strict=True)))
            self._join_extras(other)
        else:
            self._slots = copied(other._slots, self._device)
            self._load_extras(other._extras())


def _listed(tasks: Sequence[int]) -> str:
    shown = ", ".join(map(str, tasks[:6])) + (f" and {len(tasks) - 6} more" if len(tasks) > 6 else "")
    return f"task{'s' if len(tasks) != 1 else ''} {shown}"
