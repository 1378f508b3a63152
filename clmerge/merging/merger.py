"""The contract of every merge rule: an accumulator that folds task vectors in, one task at a time."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clmerge.merging.accumulators import Slots, allocate, device_of, float_dtype, slot_blocks, widen
from clmerge.merging.checks import (
    Shapes,
    check_base,
    check_finite,
    check_shapes,
    is_finite,
    read_shapes,
)
from clmerge.merging.identity import examine, with_statistics
from clmerge.merging.scope import Scope, Scoped
from clmerge.merging.sparsify.sparsifier import Sparsifier
from clmerge.merging.state import Accumulator, listed
from clmerge.merging.step import PIECE, Score, Statistics, Step
from clmerge.weights.bank import TaskVectorBank
from clmerge.weights.task_vector import State, TaskVector


class Merger(Accumulator, Scoped):
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
        removable: Whether a task can be taken out again: the rule is a group, ``downdate`` inverts ``update``. Such
            a rule multiplies what it adds to its accumulators by ``step.sign``.
        task_views: Whether every task is served by a view of its own (``task_view``), so that images must say which
            task they are of; ``compute()`` is then what is left where they do not.
        keeps_vectors: Whether every task vector is kept, in memory or in a bank (``use_bank``).
        reading_bytes: What ``compute()`` of such a rule takes per parameter, beside the result and the task vectors of
            one parameter.
        requires: Names of the statistics that ``update`` needs beside the vector.
        requires_score: Whether ``update`` needs a ``score`` as well.
        scope: Whether parameters can be merged one at a time; see ``Scoped``.
        tasks: Index of every merged task, in order of arrival.
        num_tasks: How many there are.
    """

    summary: str = ""
    source: str = ""
    exact_online: bool = True
    removable: bool = False
    task_views: bool = False
    keeps_vectors: bool = False
    reading_bytes: int = 0
    requires: frozenset[str] = frozenset()
    requires_score: bool = False
    scope: Scope = "parameter"
    _sees_model = frozenset({"_plan", "_overview", "_after_update", "_fold_in", "compute"})

    # What a rule defines

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

    def _sparsify_with(self, sparsifiers: list[Sparsifier]) -> bool:
        """Take over what a pipeline does to task vectors; False if the rule leaves that to the pipeline."""
        return False

    # What every rule has

    def matrices(self, shapes: Shapes) -> list[str]:
        """Describe, one line each, the parameters that this rule decomposes as matrices; empty if none.

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
            score: Held-out accuracy of theta0 + vector, for rules with ``requires_score``.
            statistics: What else ``requires`` names, for example ``{"fisher": {name: tensor}}``.

        Raises:
            TypeError: If ``task_vector`` is not a mapping of names to tensors.
            ValueError: If it holds NaN or Inf, names, shapes or the base differ from before, the task is merged
                already, or something the rule requires is missing. The state is then as it was.
        """
        task = max(self.tasks, default=-1) + 1 if task is None else task
        if task in self._identities:
            raise ValueError(
                f"expected a task that is not merged yet, got task {task} again (merged are {listed(self.tasks)}); "
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

    def use_bank(self, bank: TaskVectorBank) -> None:
        """Read task vectors from a bank where the rule would keep copies; nothing changes for rules that keep none.

        State and checkpoints then hold their fingerprints alone. The caller stores every vector in the bank, under the
        task index of its ``update``, before the next ``compute()``.

        Args:
            bank: Where the vectors are.
        """

    # How it works inside

    def _change(self, vector: State, base: str | None, step: Step) -> None:
        """Check a task vector and what comes with it, then fold it in or take it out."""
        shapes = read_shapes(vector)
        source = "the task vector" if step.task < 0 else f"the task vector of task {step.task}"
        if self.num_tasks:
            check_shapes(shapes, self._shapes, source)
        check_base(base, self.base, source)
        if self.requires_score and step.score is None:
            raise ValueError(
                f"expected a held-out metric for {type(self).__name__}, got none; pass score=... to update()"
            )
        if missing := sorted(self.requires - step.statistics.keys()):
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
                f"expected one task with this vector, got {listed(matching)}; say which to take out: task=..."
            )
        where = f"the vector and statistics of task {step.task}" if step.task >= 0 else "those of a merged task"
        raise ValueError(
            f"expected {where} to take out of {self!r} (merged are {listed(self.tasks)}), got others; give what "
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
