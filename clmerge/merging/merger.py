"""The interface of every merge rule: an accumulator that folds in one task vector at a time."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clmerge.merging.accumulators import Slots, allocate, device_of, float_dtype, slot_blocks, widen
from clmerge.merging.at_once import concatenated, packed_slots
from clmerge.merging.checks import (
    Shapes,
    check_base,
    check_finite,
    check_shapes,
    not_finite,
    read_shapes,
)
from clmerge.merging.identity import examine, with_statistics
from clmerge.merging.scope import Scope, Scoped, Tally
from clmerge.merging.sparsify.sparsifier import Sparsifier
from clmerge.merging.state import Accumulator, listed
from clmerge.merging.step import PIECE, Gradients, Score, Statistics, Step
from clmerge.merging.vectors import Pack
from clmerge.weights.task_vector import State, TaskVector


class Unnamed(str):
    """The name of a class that has none; a rule that inherits it cannot be instantiated."""

    __isabstractmethod__ = True


class Merger(Accumulator, Scoped):
    """Merge task vectors as a streaming reduction with constant memory.

    ``compute()`` after t updates returns the rule applied to tasks 1..t, for every t. A subclass keeps its
    constructor arguments under their own names, declares the accumulators of a parameter (``slots``), and defines two
    short functions: ``_fold_block`` folds in a piece of a task vector, ``_read_block`` reads the merged piece.
    Subclasses are the registry: ``registered_mergers`` finds every class with a name.

    Attributes:
        name: Short name in results and file names. A class without one is a base of rules: it is abstract.
        summary: One line for the table of mergers.
        source: arXiv id of the paper.
        exact_online: Whether ``compute()`` equals the batch rule at every t with a state that does not grow.
        removable: Whether a task can be removed again: ``downdate`` inverts ``update``. Such a rule multiplies what it
            adds to its accumulators by ``step.sign``, or keeps every vector.
        task_views: Whether every task has its own merged model (``task_view``), so that prediction needs the task of
            each image; ``compute()`` returns the model for images of unknown task.
        ignored_by_views: Names of the settings that views do not depend on.
        keeps_vectors: Whether every task vector is kept, in memory or as a reference to where it lies.
        reading_bytes: Bytes per parameter that ``compute()`` of such a rule takes, in addition to the result and the
            task vectors of one parameter.
        requires: Names of the statistics that ``update`` needs in addition to the vector.
        requires_score: Whether ``update`` also needs a ``score``.
        requires_gradient: Whether ``update`` also needs ``gradients``, because the rule learns on adaptation images.
        reads_labels: Whether it reads the labels of these images.
        scope: Whether parameters can be merged one at a time; see ``Scoped``.
        tasks: Indices of the merged tasks, in order of arrival.
        num_tasks: Number of merged tasks.
    """

    name: str = Unnamed()
    summary: str = ""
    source: str = ""
    exact_online: bool = True
    removable: bool = False
    task_views: bool = False
    ignored_by_views: tuple[str, ...] = ()
    keeps_vectors: bool = False
    reading_bytes: int = 0
    requires: frozenset[str] = frozenset()
    requires_score: bool = False
    requires_gradient: bool = False
    reads_labels: bool = False
    scope: Scope = "parameter"
    _sees_model = frozenset({"_plan", "_overview", "_after_update", "_fold_in", "compute"})

    # What a rule defines

    def _plan(self, vector: State, step: Step) -> Any:
        """Compute the whole-vector quantities that folding needs; may raise, and does not change the state."""
        return None

    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        """Fold in one parameter; a rule that does not define this folds in as many at once as their device takes."""
        self._fold_pack(Pack({name: tuple(tau.shape)}), slots, tau, step, plan)

    def _fold_pack(self, pack: Pack, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        """Fold in parameters that lie one after the other in flat tensors; by default block by block."""
        dtype = float_dtype(slots)
        for block, (piece,) in slot_blocks(slots, tau):
            self._fold_block(block, piece.to(dtype), step, plan)

    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        """Fold one flat piece of a parameter into the same piece of its accumulators, in place."""
        raise TypeError(f"{type(self).__name__} defines neither _fold nor _fold_block")

    def _after_update(self, step: Step, plan: Any) -> None:
        """Update the state that the rule keeps in addition to the per-parameter accumulators."""

    def _overview(self) -> Any:
        """Compute the whole-state quantities that reading needs."""
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
        """Apply a pipeline's sparsifiers inside the rule; False if the rule leaves that to the pipeline."""
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
        gradients: Gradients | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """Fold in one task vector. The vector is neither changed nor kept.

        Args:
            task_vector: Parameter name -> tensor, any floating dtype, the same names and shapes every time.
            task: Index of the task: it identifies the task in this accumulator, seeds random rules, and selects
                per-task settings. Default: one more than the largest so far, 0 at first.
            base: Fingerprint of the base model (``clmerge.weights.fingerprint``). Default: not checked.
            score: Held-out accuracy of theta0 + vector, for rules with ``requires_score``.
            gradients: Gradients on adaptation images, for rules with ``requires_gradient``.
            statistics: The statistics named by ``requires``, for example ``{"fisher": {name: tensor}}``.

        Raises:
            TypeError: If ``task_vector`` is not a mapping of names to tensors.
            ValueError: If it holds NaN or Inf, names, shapes or the base differ from before, the task is already
                merged, or something the rule requires is missing. The state is then unchanged.
        """
        task = max(self.tasks, default=-1) + 1 if task is None else task
        if task in self._identities:
            raise ValueError(
                f"expected a task that is not merged yet, got task {task} again (merged are {listed(self.tasks)}); "
                "give every task vector an index of its own"
            )
        given = Step(task=task, position=self.num_tasks, score=score, gradients=gradients, statistics=statistics or {})
        self._change(task_vector, base, given)

    def update_piece(self, piece: State, task: int, *, statistics: Statistics | None = None) -> None:
        """Fold in one parameter, or a flat piece of one, of a task vector that is read piece by piece.

        ``merge_out_of_core`` uses this for vectors that are not in memory. The identity of the whole vector is
        unknown, so the accumulator can neither be joined nor remove the task again.

        Args:
            piece: Name -> tensor.
            task: Index of the task.
            statistics: The statistics named by ``requires``.

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
        """Remove a task vector: the inverse of the ``update`` that folded it in.

        Args:
            task_vector: The vector that was given to ``update``.
            task: The task index that was given to ``update``. Default: that of the task with this vector.
            base: Fingerprint of the base model. Default: not checked.
            statistics: The statistics that were given to ``update``.

        Raises:
            TypeError: If the rule cannot remove single tasks.
            RuntimeError: If no task is merged.
            ValueError: As for ``update``, and if this vector was not merged; the state is then unchanged.
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
        """Return the vector to add to theta0 for one task, for rules that keep a mask per task.

        Args:
            task: Index of the task, as given to ``update``.

        Raises:
            TypeError: If the rule has one merged model for all tasks.
        """
        raise TypeError(f"expected a rule with a mask per task, got {self!r}; use compute()")

    def compute(self) -> TaskVector:
        """Return the merged vector, to be added to theta0, of the tasks merged so far, scale included.

        Returns:
            New tensors by name, float32 (float64 after float64 vectors), on the accumulators' device.

        Raises:
            RuntimeError: If nothing was merged yet, or the merged vector overflows.
        """
        if not self.num_tasks:
            raise RuntimeError(f"expected at least one update() before compute() of {type(self).__name__}, got none")
        with torch.inference_mode(False), torch.no_grad():
            return self._computed(self._overview())

    def tally(self) -> Tally:
        """Return what the pieces folded in since ``reset`` add to the sum over the model that ``decide`` is given."""
        return Tally()

    def decide(self, votes: int) -> Any:
        """Return what ``compute_decided`` needs to know of the sum of the tallies over the whole model."""
        return None

    def compute_decided(self, decision: Any) -> TaskVector:
        """Return the merged pieces folded in since ``reset``, as parts of a model that gives this decision.

        Args:
            decision: The result of ``decide``.

        Raises:
            RuntimeError: As for ``compute``.
        """
        return self.compute()

    def _computed(self, overview: Any) -> TaskVector:
        """Read every parameter; refuse an overflow."""
        merged = {name: self._read(name, slots, overview) for name, slots in self._held().items()}
        if wrong := not_finite(merged):
            raise RuntimeError(
                f"expected finite sums, got an overflow in {wrong[0]!r} of {self!r}; scale the task vectors "
                "down or use float64"
            )
        return merged

    # How it works inside

    def _change(self, vector: State, base: str | None, step: Step) -> None:
        """Check a task vector and its statistics, then fold it in or remove it."""
        shapes = read_shapes(vector)
        source = "the task vector" if step.task < 0 else f"the task vector of task {step.task}"
        if self.num_tasks:
            check_shapes(shapes, self._shapes, source)
        check_base(base, self.base, source)
        if self.requires_score and step.score is None:
            raise ValueError(
                f"expected a held-out metric for {type(self).__name__}, got none; pass score=... to update()"
            )
        if self.requires_gradient and step.gradients is None:
            raise ValueError(
                f"expected gradients on adaptation images for {type(self).__name__}, got none; pass gradients=... to "
                "update()"
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
        """Return the index of the task to remove; raise a ValueError if the vector was not merged."""
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
        """Fold in or remove a checked task vector, and record its identity."""
        plan = self._fold_in(vector, shapes, step)
        self._shapes, self.base = shapes, self.base or base
        if step.sign > 0:
            self._identities[step.task] = step.identity
        else:
            del self._identities[step.task]
        self._after_update(step, plan)

    def _fold_in(self, vector: State, shapes: Shapes, step: Step) -> Any:
        """Fold in or remove a checked task vector; return the plan."""
        plan = self._plan(vector, step)
        dtypes = self._slot_dtypes(step.position + 1)
        slots = self._slots or allocate(vector, dtypes, self._device)
        widen(slots, dtypes)
        if type(self)._fold is Merger._fold:
            for pack, flat in packed_slots(slots):
                taus = [vector[name].detach().to(device_of(flat)) for name in pack.names]
                self._fold_pack(pack, flat, concatenated(taus), step, plan)
        else:
            for name, accumulators in slots.items():
                self._fold(name, accumulators, vector[name].detach().to(device_of(accumulators)), step, plan)
        self._slots = slots
        return plan
