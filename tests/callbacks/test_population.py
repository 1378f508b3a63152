import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from support.tiny import ForeignModule, toy_loader
from torch import nn

from clmerge.callbacks import MergeCallback, Population
from clmerge.callbacks.member_settings import augment
from clmerge.merging import MagMax
from clmerge.training.exchange_rules import Average, Keep, Pull, Shuffle
from clmerge.weights import task_vector


class Recorded(ForeignModule):
    """Remembers its weights before and after every batch, and what validations evaluate."""

    def __init__(self, *, optimizer=torch.optim.Adam, **options):
        super().__init__(**options)
        self.optimizer = optimizer
        self.before, self.after, self.validated = [], [], []

    def forward(self, inputs):
        return self.net(inputs)

    def on_train_batch_start(self, batch, batch_idx):
        self.before.append(copy.deepcopy(self.state_dict()))

    def on_validation_epoch_start(self):
        self.validated.append(copy.deepcopy(self.state_dict()))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.05)


class After(Callback):
    """Lets a module remember its weights after every batch, before other callbacks change them."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if isinstance(pl_module, Recorded):
            pl_module.after.append(copy.deepcopy(pl_module.state_dict()))


def started(**options):
    torch.manual_seed(0)
    return Recorded(**options)


def fit(module, callbacks, *, epochs, ckpt_path=None, **options):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[After(), *callbacks],
        **options,
    )
    trainer.fit(module, toy_loader(0), toy_loader(1), ckpt_path=ckpt_path)
    return trainer


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first, second):
    return all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def mean(points):
    return {name: torch.stack([point[name] for point in points]).mean(0) for name in points[0]}


@pytest.mark.parametrize("exchange", [Average(), Pull(0.9), Shuffle(0.5), Keep()])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_one_member_is_plain_training_bit_for_bit(exchange, optimizer):
    plain, one = started(optimizer=optimizer), started(optimizer=optimizer)
    fit(plain, [], epochs=3)
    fit(one, [Population(1, exchange)], epochs=3)
    assert same(plain.state_dict(), one.state_dict())


def test_members_take_turns_and_the_mean_is_left():
    module = started()
    base = copy.deepcopy(module.state_dict())
    merge = MergeCallback(MagMax(scale=1.0))
    fit(module, [merge, Population(3, Keep())], epochs=3)
    for step in range(9):  # a member goes on from where its own last step ended
        assert same(module.before[step], module.after[step - 3] if step >= 3 else base)
    assert close(module.state_dict(), mean(module.after[-3:]))
    assert close(module.validated[0], mean(module.after[:3]))
    assert same(merge.merged_vector(), task_vector(module.state_dict(), base))


def test_each_member_is_a_training_of_its_own_on_its_batches():
    module = started()
    fit(module, [Population(3, Keep())], epochs=4)
    batches = list(toy_loader(0))
    for member in range(3):
        alone = started()
        optimizer = alone.configure_optimizers()
        for _ in range(4):
            optimizer.zero_grad()
            alone.training_step(batches[member], 0).backward()
            optimizer.step()
        assert same(module.after[9 + member], alone.state_dict())


def test_exchanges_after_every_so_many_steps_of_each_member():
    module = started(optimizer=torch.optim.SGD)
    fit(module, [Population(3, Average(), every=2)], epochs=4)  # 4 rounds
    assert same(module.before[3], module.after[0])  # after the first round nothing is exchanged
    for member in range(3):
        assert close(module.before[6 + member], mean(module.after[3:6]))


def test_accumulated_gradients_are_one_step_of_one_member():
    module = started()
    fit(module, [Population(2, Average())], epochs=4, accumulate_grad_batches=3)
    assert same(module.before[3], started().state_dict())  # the second member has not moved yet
    assert close(module.before[6], mean([module.after[2], module.after[5]]))


def test_pull_follows_the_learning_rate():
    class Scheduled(Recorded):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    torch.manual_seed(0)
    module = Scheduled()
    fit(module, [Population(3, Pull(0.8))], epochs=3)
    for epoch, share in ((0, 0.2), (1, 0.1)):
        after = module.after[3 * epoch : 3 * epoch + 3]
        centre = mean(after)
        for member in range(3):
            expected = {name: after[member][name].lerp(centre[name], share) for name in centre}
            assert close(module.before[3 * epoch + 3 + member], expected)


def test_late_phase_weights_share_the_others():
    module = started(optimizer=torch.optim.SGD)
    base = copy.deepcopy(module.state_dict())
    fit(module, [Population(3, Keep(), include=["net.3.bias"], start=0.5)], epochs=6)  # begins at step 9 of 18
    batches = list(toy_loader(0))
    plain = started(optimizer=torch.optim.SGD)
    fit(plain, [], epochs=3)
    assert same(module.before[9], plain.state_dict())
    # In a round the shared weights move once, by the mean gradient, and the others by their own.
    for member in range(3):
        assert torch.equal(module.before[9 + member]["net.0.weight"], module.before[9]["net.0.weight"])
    gradients = []
    for member in range(3):
        plain.zero_grad()
        plain.training_step(batches[member], 0).backward()
        gradients.append({name: p.grad.clone() for name, p in plain.named_parameters()})
        expected = module.before[9]["net.3.bias"] - 0.05 * gradients[member]["net.3.bias"]
        assert torch.allclose(module.after[9 + member]["net.3.bias"], expected, atol=1e-6)
    moved = module.before[9]["net.0.weight"] - 0.05 * mean(gradients)["net.0.weight"]
    assert torch.allclose(module.before[12]["net.0.weight"], moved, atol=1e-6)
    assert torch.allclose(module.net[3].bias, mean(module.after[-3:])["net.3.bias"], atol=1e-6)
    assert not torch.equal(module.after[-1]["net.3.bias"], module.after[-2]["net.3.bias"])
    assert not same(base, module.state_dict())


def test_initial_deviations():
    module = started()
    base = copy.deepcopy(module.state_dict())
    fit(module, [Population(2, Keep(), noise=0.1, seed=3)], epochs=1)
    moved = torch.cat([(module.before[0][name] - base[name]).flatten() for name in ("net.0.weight", "net.3.weight")])
    assert 0 < moved.abs().max() < 0.3
    assert not same(module.before[0], module.before[1])
    again = started()
    fit(again, [Population(2, Keep(), noise=0.1, seed=3)], epochs=1)
    assert same(again.state_dict(), module.state_dict())


def test_settings_of_every_member():
    class Scheduled(Recorded):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    torch.manual_seed(0)
    module = Scheduled()
    settings = [{"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.5}, {}]
    trainer = fit(module, [Population(3, Keep(), settings=settings)], epochs=2)
    batches = list(toy_loader(0))
    for member, (rate, decay) in enumerate([(0.1, 0.0), (0.2, 0.5), (0.1, 0.0)]):
        alone = started()
        for epoch in range(2):
            optimizer = torch.optim.SGD(alone.parameters(), lr=rate * 0.5**epoch, weight_decay=decay)
            optimizer.zero_grad()
            alone.training_step(batches[member], 0).backward()
            optimizer.step()
        assert close(module.after[3 + member], alone.state_dict())
    [group] = trainer.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1 * 0.5**2, 0)
    with pytest.raises(ValueError, match="settings for each of the 2 members, got 1"):
        Population(2, Keep(), settings=[{}])
    with pytest.raises(ValueError, match=r"a setting of Adam, one of .*got 'speed'"):
        fit(started(), [Population(2, Keep(), settings=[{}, {"speed": 1.0}])], epochs=1)


class Noise:
    def __call__(self, image):
        return image + torch.randn_like(image)


def test_augmentation_of_every_member(tmp_path):
    class Images(Recorded):
        def training_step(self, batch, batch_idx):
            self.inputs = [*getattr(self, "inputs", []), batch[0].clone()]
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def run(seed):
        torch.manual_seed(0)
        module = Images()
        fit(module, [Population(3, Keep(), augmentations=[[], [lambda x: -x], [Noise()]], seed=seed)], epochs=2)
        return module.inputs, torch.rand(1)

    (seen, after), batches = run(0), [batch[0] for batch in toy_loader(0)]
    for epoch in range(2):
        assert torch.equal(seen[3 * epoch], batches[0])
        assert torch.equal(seen[3 * epoch + 1], -batches[1])
    noise = torch.stack([seen[place] - batches[2] for place in (2, 5)])
    assert noise.abs().min() > 0
    assert len(noise.flatten(0, 1).unique(dim=0)) == 16  # other draws for every image and epoch
    (again, after_again), (others, _) = run(0), run(1)
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))
    assert torch.equal(after, after_again)
    assert not torch.equal(seen[2], others[2])
    for batch, told in (({"x": 1}, "begins with its images"), ([torch.zeros(2, 3)], "keep the shape")):
        with pytest.raises(ValueError, match=told):
            augment(batch, [lambda image: image[:1]], seed=0)
    with pytest.raises(ValueError, match="augmentations for each of the 2 members, got 1"):
        Population(2, Keep(), augmentations=[[]])


def test_running_statistics_are_those_of_the_mean():
    module = started(batch_norm=True)
    fit(module, [Population(3, Keep())], epochs=2)
    inputs = [module.net[0](batch[0]) for batch in toy_loader(0)]
    assert torch.allclose(module.net[1].running_mean, torch.stack([one.mean(0) for one in inputs]).mean(0), atol=1e-6)


def test_the_second_moments_are_the_members_mean():
    module = started()
    states = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            states.append(copy.deepcopy(trainer.optimizers[0].state[pl_module.net[3].bias]["exp_avg_sq"]))

    found = {}

    class End(Callback):
        def on_train_end(self, trainer, pl_module):
            found["adam"] = trainer.optimizers[0].state[pl_module.net[3].bias]["exp_avg_sq"].clone()

    fit(module, [Look(), Population(3, Keep()), End()], epochs=2)
    assert torch.allclose(found["adam"], torch.stack(states[-3:]).mean(0))


class Kill(Callback):
    def __init__(self, epoch, hook):
        setattr(self, hook, lambda trainer, *_: self.fail(trainer, epoch))

    def fail(self, trainer, epoch):
        if trainer.current_epoch >= epoch:
            raise RuntimeError("killed")


POPULATIONS = {
    "lookaround": lambda: Population(2, Average(), every=2),
    "papa": lambda: Population(3, Pull(0.9)),
    "wash": lambda: Population(2, Shuffle(0.5), noise=0.1),
    "diverse": lambda: Population(2, Keep(), settings=[{"lr": 0.1}, {}], augmentations=[[], [Noise()]]),
    "late_phase": lambda: Population(2, Keep(), include=["net.3.*"], start=0.2, noise=0.1),
}


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize(
    ("epoch", "hook"),
    [(1, "on_train_epoch_start"), (3, "on_train_epoch_start"), (4, "on_train_end"), (4, "on_fit_end")],
)
def test_a_fit_that_was_killed_ends_with_the_same_bits(tmp_path, name, epoch, hook):
    whole = started(batch_norm=True)
    fit(whole, [POPULATIONS[name]()], epochs=4)
    killed = started(batch_norm=True)
    base = {name: tensor.clone() for name, tensor in killed.named_parameters()}

    def callbacks():
        saving = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
        return [MergeCallback(MagMax(scale=1.0), base=base), POPULATIONS[name](), saving]

    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, [Kill(epoch, hook), *callbacks()], epochs=4)
    resumed, again = started(batch_norm=True), callbacks()
    fit(resumed, again, epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(again[0].merged_vector(), task_vector({name: whole.state_dict()[name] for name in base}, base))


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="size and every of 1 or more"):
        Population(0, Keep())
    with pytest.raises(ValueError, match="include to select trained parameters"):
        fit(started(), [Population(2, Keep(), include=["nothing.*"])], epochs=1)
    with pytest.raises(TypeError, match=r"which buffers='recompute' calls .* or choose 'latest'"):
        fit(ForeignModule(batch_norm=True), [Population(2, Keep())], epochs=1)
