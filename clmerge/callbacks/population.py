"""Train several members in one fit, which take weights from each other, and leave their mean."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from clmerge.callbacks.frozen import refuse_unfreezing
from clmerge.callbacks.member_settings import augment, own_settings
from clmerge.callbacks.ranks import refuse_parts
from clmerge.names import tell
from clmerge.statistics.provided import training_images
from clmerge.streams.splits import derived_seed
from clmerge.training.exchange_rules import ExchangeRule
from clmerge.training.trajectory import Weights, mean_of
from clmerge.weights.batch_norm import check_callable, estimated_statistics, has_running_statistics
from clmerge.weights.modes import on_device
from clmerge.weights.selection import is_included, trained_parameters
from clmerge.weights.swap import assign, named_tensors, swapped

if TYPE_CHECKING:
    from torchvision.transforms import v2


class Population(Callback):
    """Train ``size`` members in turn, one optimizer step each, and leave their mean when a fit ends.

    All members start from the same weights. Each has its own weights and optimizer state, and sees every ``size``-th
    batch, with the augmentation drawn for it; a fit of the same number of epochs therefore gives each member a
    ``size``-th of the steps: multiply ``max_epochs`` by ``size`` for as many steps each. After every ``every`` steps of
    each member they exchange weights. Validations in the fit evaluate the mean. With ``MergeCallback``, in any order,
    the task's expert is the mean, and the optimizer's second moments (``"adam"``) are the members' mean.

    Learning rates follow the fit's steps; they are shared unless ``settings`` says otherwise. Running statistics belong
    to all members; those of the mean are estimated anew. The state of all members is saved in Lightning's checkpoints,
    so that a fit that was killed at any time resumes to the same bits. The memory is ``size`` times that of the trained
    weights and optimizer state.

    Args:
        size: Number of members; 1 is plain training.
        exchange: What members take from each other: ``Average``, ``Pull``, ``Shuffle`` or ``Keep``.
        every: Steps of each member between exchanges.
        include: Glob patterns of the parameters that members have of their own; default all that are trained. The
            others are shared: they move once in a round by the mean of the members' gradients (late-phase weights).
        start: Share of the fit's optimizer steps after which there are members.
        noise: Standard deviation of the members' initial deviations, as a share of each parameter's root mean square.
        buffers: Running statistics of the mean: ``recompute`` on the training images, or ``latest``.
        seed: Seed of initial deviations, random exchanges and members' augmentation.
        settings: Settings of the optimizer for every member, such as ``{"lr": 2e-4, "weight_decay": 0.01}``, one
            mapping each; a schedule scales each member's learning rate as the optimizer's own.
        augmentations: For every member a list of transforms from an image of the batch, as the model gets it, to one of
            the same shape; their random draws are a function of seed, step and position in the batch.

    Raises:
        ValueError: If a number is out of range, or ``settings`` or ``augmentations`` are not one for each member;
            during a fit, if ``include`` selects nothing, the optimizer has no such setting, or a batch has no images
            first.
        RuntimeError: During a fit whose processes hold parts of the weights, or with several optimizers.

    Example:
        >>> from clmerge.training.exchange_rules import Pull
        >>> Population(3, Pull(0.99), every=10).size
        3
    """

    def __init__(
        self,
        size: int,
        exchange: ExchangeRule,
        *,
        every: int = 1,
        include: Sequence[str] | None = None,
        start: float = 0.0,
        noise: float = 0.0,
        buffers: Literal["recompute", "latest"] = "recompute",
        seed: int = 0,
        settings: list[dict[str, float]] | None = None,
        augmentations: list[list[v2.Transform]] | None = None,
    ) -> None:
        if size < 1 or every < 1 or noise < 0 or not 0 <= start < 1:
            raise ValueError(
                "expected size and every of 1 or more, noise of 0 or more and start from 0 to below 1, got "
                f"size={size}, every={every}, noise={noise}, start={start}"
            )
        self.size, self.exchange, self.every = size, exchange, every
        self.include = None if include is None else list(include)
        self.start, self.noise, self.buffers, self.seed = start, noise, buffers, seed
        for name, given in (("settings", settings), ("augmentations", augmentations)):
            if given is not None and len(given) != size:
                raise ValueError(f"expected {name} for each of the {size} members, got {len(given)}")
        self.settings, self.augmentations = settings, augmentations
        self._hooks: list[RemovableHandle] = []
        self._swap = ExitStack()
        self._forget()

    def _forget(self) -> None:
        self._members: list[Weights] = []
        self._moments: list[dict[str, dict[str, Any]]] = []  # optimizer state by member and parameter
        self._shared: Weights = {}  # sums of the gradients of shared parameters in this round
        self._rounds = 0  # full rounds of steps, one of every member
        self._first = 0  # the optimizer step at which the members begin
        self._largest_rate = 0.0
        self._current: int | None = None
        self._done = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()  # before Lightning restores a checkpoint

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise RuntimeError(f"expected one optimizer for Population, got {len(trainer.optimizers)}")
        refuse_parts(pl_module, type(self).__name__)
        refuse_unfreezing(trainer, type(self).__name__)
        if self.settings is not None:
            self._hooks = own_settings(trainer.optimizers[0], self.settings, lambda: self._current)
        if self.buffers == "recompute" and has_running_statistics(pl_module):
            check_callable(pl_module, "buffers='recompute'", "'latest'")
        if not self._own(pl_module):
            raise ValueError(f"expected include to select trained parameters, got none that match {self.include}")

    # Members --------------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._members:
            if self.start and trainer.global_step < self.start * float(trainer.estimated_stepping_batches):
                return
            self._fork(trainer, pl_module)
        member = (trainer.global_step - self._first) % self.size
        if member != self._current:
            self._enter(member, trainer.optimizers[0], pl_module)
        if self.augmentations is not None and self.augmentations[member]:
            place = ("augment", trainer.global_rank, trainer.current_epoch, batch_idx)
            augment(batch, self.augmentations[member], seed=derived_seed(self.seed, *place))

    def _fork(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own, optimizer = self._own(pl_module), trainer.optimizers[0]
        self._first = trainer.global_step
        for member in range(self.size):
            self._members.append({name: self._deviated(name, p, member) for name, p in own.items()})
            self._moments.append({name: _copied(optimizer.state.get(p, {})) for name, p in own.items()})

    def _deviated(self, name: str, parameter: Tensor, member: int) -> Tensor:
        copy = parameter.detach().clone()
        if self.noise:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "member", member, name))
            deviation = torch.randn(copy.shape, generator=generator).to(copy)
            copy += self.noise * copy.square().mean().sqrt() * deviation
        return copy

    def _enter(self, member: int, optimizer: Optimizer, pl_module: LightningModule) -> None:
        """Let parameters and optimizer refer to a member's tensors; nothing is copied."""
        for name, parameter in self._own(pl_module).items():
            if self._members[member][name].device != parameter.device:  # restored from a checkpoint
                self._members[member][name] = self._members[member][name].to(parameter.device)
            moments = self._moments[member][name]
            before = optimizer.state.get(parameter, {})
            for key, value in moments.items():
                if isinstance(value, Tensor) and isinstance(before.get(key), Tensor):
                    moments[key] = value.to(before[key].device)
            parameter.data = self._members[member][name]
            optimizer.state[parameter] = moments
        self._current = member

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.include is None or not self._members or self.size == 1:
            return
        last = (trainer.global_step - self._first) % self.size == self.size - 1
        for name, parameter in trained_parameters(pl_module).items():
            if is_included(name, self.include) or parameter.grad is None:
                continue
            grad = parameter.grad.detach()
            total = self._shared[name].to(grad.device) + grad if name in self._shared else grad.clone()
            self._shared[name] = total
            parameter.grad = total / self.size if last else None  # optimizers skip parameters without a gradient
        if last:
            self._shared = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._current is None:
            return
        optimizer = trainer.optimizers[0]
        for name, parameter in self._own(pl_module).items():  # an optimizer may have put new tensors there
            self._members[self._current][name] = parameter.data
            self._moments[self._current][name] = optimizer.state.get(parameter, {})
        steps = trainer.global_step - self._first
        if steps and steps % self.size == 0 and steps // self.size != self._rounds:  # once, with accumulated gradients
            self._rounds = steps // self.size
            rate = max(float(group["lr"]) for group in optimizer.param_groups)
            self._largest_rate = max(self._largest_rate, rate)
            if self._rounds % self.every == 0:
                share = rate / self._largest_rate if self._largest_rate else 0.0
                with torch.no_grad():
                    self._all_on_device(pl_module)
                    self.exchange.exchange(self._members, step=trainer.global_step, rate=share, seed=self.seed)

    def _all_on_device(self, pl_module: LightningModule) -> None:
        own = self._own(pl_module)
        for member in self._members:
            for name, tensor in member.items():
                if tensor.device != own[name].device:
                    member[name] = tensor.to(own[name].device)

    def _own(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        return {name: p for name, p in trained_parameters(pl_module).items() if is_included(name, self.include)}

    # Validation and the end ------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.size > 1 and self._members:
            self._all_on_device(pl_module)
            self._swap.enter_context(swapped(pl_module, mean_of(self._members), origin="the mean of the members"))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap.close()
        self._leave()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()
        self._put_in_place(trainer, pl_module)

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A fit killed after its last checkpoint has nothing left to train when it resumes, and Lightning does not call
        # on_train_end then. MergeCallback, which is last in a fit, merges after this.
        if not self._done and self._members and trainer.fit_loop.done:
            with on_device(pl_module, trainer.strategy.root_device):
                self._put_in_place(trainer, pl_module)

    def _put_in_place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = True
        if not self._members or self.size == 1:
            return
        self._all_on_device(pl_module)
        mean = mean_of(self._members)
        own, optimizer = self._own(pl_module), trainer.optimizers[0]
        for name, parameter in own.items():
            parameter.data = parameter.detach().clone()  # no longer a member's
            optimizer.state[parameter] = _mean_state([moments[name] for moments in self._moments])
        assign(own, mean)
        if self.buffers == "recompute" and has_running_statistics(pl_module):
            statistics = estimated_statistics(pl_module, training_images(pl_module))
            assign(named_tensors(pl_module, statistics, origin="the mean's running statistics"), statistics)
        if trainer.is_global_zero:
            tell(f"the weights are replaced by the mean of {self.size} members ({type(self.exchange).__name__})")

    # State ---------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "members": [_copied(member, "cpu") for member in self._members],
            "moments": [{name: _copied(one, "cpu") for name, one in member.items()} for member in self._moments],
            "shared": _copied(self._shared, "cpu"),
            "first": self._first,
            "rounds": self._rounds,
            "largest_rate": self._largest_rate,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._members = [dict(member) for member in state_dict["members"]]
        self._moments = [{name: dict(one) for name, one in member.items()} for member in state_dict["moments"]]
        self._shared = dict(state_dict["shared"])
        self._first, self._rounds = int(state_dict["first"]), int(state_dict["rounds"])
        self._largest_rate = float(state_dict["largest_rate"])


def _copied(values: dict[str, Any], device: str | None = None) -> dict[str, Any]:
    return {
        name: value.detach().to(device or value.device, copy=True) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _mean_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an optimizer's state of one parameter, averaged over the members."""
    first = states[0]
    return {
        key: torch.stack([state[key].to(value.device) for state in states]).mean(0)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in first.items()
        if all(key in state for state in states)
    }
