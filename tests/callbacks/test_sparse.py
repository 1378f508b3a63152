import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks import MergeCallback, Population, Sparse, Subspace
from clmerge.merging import WeightAverage
from clmerge.training.exchange_rules import Keep


def started():
    torch.manual_seed(0)
    return ForeignModule()


def fit(module, callbacks, *, data=0, ckpt_path=None):
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, toy_loader(data), ckpt_path=ckpt_path)
    return module


def zeros(module):
    return {name: p.detach() == 0 for name, p in module.named_parameters()}


def test_the_smallest_weights_are_zero_until_the_end():
    module = started()
    sizes = torch.cat([module.net[0].weight.detach().abs().flatten(), module.net[3].weight.detach().abs().flatten()])
    smallest = sizes.sort().values[: round(0.5 * 42)].max()
    expected = {0: module.net[0].weight.detach().abs() <= smallest, 3: module.net[3].weight.detach().abs() <= smallest}
    fit(module, [Sparse(0.5)])
    for layer, mask in expected.items():
        assert torch.equal(module.net[layer].weight == 0, mask)
        assert (module.net[layer].bias != 0).all()
    only = fit(started(), [Sparse(0.5, include=["net.0.*"])])
    assert int((only.net[0].weight == 0).sum() + (only.net[0].bias == 0).sum()) == 15
    assert (only.net[3].weight != 0).all()


def test_averages_of_fits_from_one_start_are_as_sparse():
    module, base = started(), {name: p.detach().clone() for name, p in started().named_parameters()}
    merge = MergeCallback(WeightAverage(), start_policy="base")
    for task in range(2):
        fit(module, [Sparse(0.5), merge], data=task)
    merged = {name: base[name] + tensor for name, tensor in merge.merged_vector().items()}
    assert all(torch.equal(merge.base[name], tensor) for name, tensor in base.items())  # theta_0 is not pruned
    assert all(torch.equal(merged[name] == 0, mask) for name, mask in zeros(module).items())
    assert sum(int(mask.sum()) for mask in zeros(module).values()) == 21


def test_a_fit_that_was_killed_keeps_its_mask(tmp_path):
    class Kill(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError("killed")

    whole = fit(started(), [Sparse(0.5)])
    with pytest.raises(RuntimeError, match="killed"):
        fit(started(), [Kill(), Sparse(0.5), ModelCheckpoint(dirpath=tmp_path, filename="last")])
    resumed = fit(started(), [Sparse(0.5), ModelCheckpoint(dirpath=tmp_path)], ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


@pytest.mark.parametrize(
    "callback", [Sparse(0.5), Subspace(2), Population(2, Keep())], ids=lambda one: type(one).__name__
)
def test_parameters_that_are_unfrozen_later_are_refused(callback):
    with pytest.raises(ValueError, match=rf"from the start of a fit with {type(callback).__name__}, got a callback"):
        fit(started(), [callback, Unfreezes()])


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"sparsity as a share from 0 to below 1, got 1\.5"):
        Sparse(1.5)
    with pytest.raises(ValueError, match="include to select trained parameters"):
        fit(started(), [Sparse(include=["nothing.*"])])
