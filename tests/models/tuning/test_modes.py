"""What holds in every mode of tuning, for every merger and every start policy."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from support.merger_cases import CASES, own_rules
from support.references import statistics_of
from support.towers import clip_tower, images, shake
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clmerge.callbacks import MergeCallback
from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import MagMax, TaskArithmetic
from clmerge.models import add_adapters, add_ia3, add_lora
from clmerge.weights.parametrization import dense_weights, merged_parameters, read_task_vector
from clmerge.weights.swap import swapped

MODES = {
    "lora": lambda model: add_lora(model, r"\.(attn|mlp)\.", rank=2),
    "ia3": add_ia3,
    "adapters": lambda model: add_adapters(model, width=2),
    "layernorm": lambda model: [p.requires_grad_(True) for n, p in model.named_parameters() if ".ln_" in n],
}
every_mode = pytest.mark.parametrize("mode", MODES)


def tuned(mode, folder):
    model, _ = clip_tower(folder)
    model.requires_grad_(False)
    torch.manual_seed(0)
    MODES[mode](model)
    return model


def trained(model, seed):
    shake(model, ("lora_", "ia3", "adapter_", ".ln_"), seed=seed)
    return model


def size_of(weights):
    """A held-out metric, as coarse as an accuracy."""
    return round(float(sum(tensor.abs().sum() for tensor in weights.values())), 2)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("lora", name) for name, rule in own_rules().items() if not rule().requires_gradient),
        *((mode, "MagMax") for mode in MODES if mode != "lora"),
    ],
)
def test_every_merger_merges_what_was_trained(tmp_path, mode, name):
    """The merged model computes with theta_0 plus what the rule gives for the task vectors; training weights return."""
    model = tuned(mode, tmp_path)
    case = next(case for case in CASES.values() if type(case.build()).__name__ == name)
    alone, tasks = case.build(), []

    def statistics(module):
        return statistics_of(len(tasks), {n: tuple(t.shape) for n, t in merge.base.items()}) | {"weights": merge.base}

    def score(module):
        return size_of(dense_weights(module, merge.base))

    merge = RunningMerge({"m": case.build()}, score=score, statistics=statistics)
    merge.start(model)
    for seed in (1, 2):
        tau = merge.task_vector(trained(model, seed))
        tasks.append(tau)
        own = copy.deepcopy(model.state_dict())
        merge.fold(tau, model)
    for index, tau in enumerate(tasks):
        measured = statistics_of(index + 1, {n: tuple(t.shape) for n, t in tau.items()}) | {"weights": merge.base}
        alone.update(
            tau,
            task=index,
            score=lambda vector: size_of({n: merge.base[n] + t for n, t in vector.items()}),
            statistics=measured,
        )
    with merge.merged(model):
        found = read_task_vector(model, merge.base)
    for parameter, tensor in alone.compute().items():
        torch.testing.assert_close(found[parameter], tensor.float(), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items())


class Tuned(LightningModule):
    """Somebody's module, in which a part is tuned."""

    def __init__(self, mode, folder):
        super().__init__()
        self.tower = tuned(mode, folder).train()
        self.head = nn.Linear(8, 2).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.head(self.tower(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def loader(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(12) % 2
    x = torch.randn(12, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return DataLoader(TensorDataset(x, labels), batch_size=6)


def fit(module, seed, *callbacks, ckpt_path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    quiet |= {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "accelerator": "cpu"}
    Trainer(callbacks=list(callbacks), **quiet, **options).fit(module, loader(seed), ckpt_path=ckpt_path)


def now(module, names):
    return {name: tensor.detach().clone() for name, tensor in dense_weights(module, names).items()}


class Start(Callback):
    def __init__(self):
        self.weights, self.inner = [], []

    def on_train_start(self, trainer, module):
        self.weights.append(now(module, merged_parameters(module)))
        self.inner.append({n: p.detach().clone() for n, p in module.named_parameters() if "lora_" in n or "ia3" in n})


@every_mode
@pytest.mark.parametrize("policy", ["base", "previous", "merged"])
def test_a_foreign_project_merges_with_every_start_policy(tmp_path, mode, policy):
    torch.manual_seed(0)
    module, start = Tuned(mode, tmp_path), Start()
    merge = MergeCallback([TaskArithmetic(scale=0.5), MagMax()], start_policy=policy)
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    ends, merged = [], []
    for task in range(3):
        fit(module, task, merge, start)
        ends.append(now(module, merge.base))
        merged.append(merge.merged_state())
    base = start.weights[0]
    expected = {"base": [base, base], "previous": ends, "merged": merged}[policy]
    for task in (1, 2):
        for name, tensor in start.weights[task].items():
            torch.testing.assert_close(tensor, expected[task - 1][name], rtol=1e-5, atol=1e-6)
        for name, tensor in start.inner[task].items():
            assert tensor.any() == ("lora_A" in name), "a task starts with fresh inner parameters"
    taus = [{n: end[n] - base[n] for n in base} for end in ends]
    for name, tensor in merge.merged_state().items():
        torch.testing.assert_close(tensor, base[name] + 0.5 * sum(tau[name] for tau in taus), rtol=1e-4, atol=1e-5)
    assert max(float(tau[name].abs().max()) for tau in taus for name in tau) > 1e-2
    left = {n: p for n, p in module.named_parameters() if n in frozen and n not in merge.base}
    assert all(torch.equal(frozen[name], p) for name, p in left.items())


class StopError(Exception):
    pass


class Stop(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise StopError


@pytest.mark.parametrize("mode", ["lora", "ia3"])
def test_resume_from_a_lightning_checkpoint_equals_no_crash(tmp_path, mode):
    def fresh():
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path, filename="last", save_top_k=1, enable_version_counter=False)
        return Tuned(mode, tmp_path), MergeCallback(MagMax(), start_policy="merged"), checkpoint

    module, merge, _ = fresh()
    for task in (0, 1):
        fit(module, task, merge)
    again, remerge, checkpoint = fresh()
    fit(again, 0, remerge)
    with pytest.raises(StopError):
        fit(again, 1, Stop(), remerge, checkpoint)
    again, remerge, checkpoint = fresh()
    fit(again, 1, remerge, checkpoint, ckpt_path=tmp_path / "last.ckpt")
    assert remerge.num_tasks == 2
    for one, other in ((again.state_dict(), module.state_dict()), (remerge.merged_state(), merge.merged_state())):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_half_precision_weights_train_and_merge(tmp_path):
    torch.manual_seed(0)
    module = Tuned("lora", tmp_path)
    merge = MergeCallback(TaskArithmetic(scale=1.0), start_policy="base")
    for task in (0, 1):
        fit(module, task, merge, precision="bf16-mixed")
    with merge.merged(module), torch.no_grad():
        assert torch.isfinite(module.tower(images(8))).all()
    name = next(iter(merge.base))
    total = merge.merged_vector()[name]
    assert int(torch.linalg.matrix_rank(total[:8], atol=1e-6)) == 4, "two changes of rank two"


def test_swapped_weights_are_those_of_the_mode(tmp_path):
    model = trained(tuned("lora", tmp_path), 1)
    merge = RunningMerge(TaskArithmetic())
    merge.start(model)
    with swapped(model, merge.weights_with({}, model)):
        assert all(not tensor.any() for tensor in merge.task_vector(model).values())
