import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from support.tiny import ForeignModule, toy_loader
from torch import nn
from torch.optim.swa_utils import update_bn

from clmerge.callbacks import MergeCallback
from clmerge.merging import (
    DARE,
    EMR,
    PCB,
    TALL,
    TIES,
    Ethos,
    Fisher,
    GroupScale,
    MagMax,
    Pipeline,
    Quantise,
    TaskArithmetic,
    WeightAverage,
)
from clmerge.models import add_lora
from clmerge.weights import TaskVectorBank, save_tensors


def make_trainer(*callbacks, epochs=2, **options):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ForeignModule()


def stream(model, merge, num_tasks=3):
    """Fit ``num_tasks`` tasks, each with a new Trainer; return the trained weights after each."""
    trained = []
    for task in range(num_tasks):
        make_trainer(merge).fit(model, toy_loader(task))
        trained.append(weights(model))
    return trained


def test_three_lines_merge_what_the_formula_says(model):
    base = weights(model)
    merge = MergeCallback(MagMax(scale=0.5), start_policy="previous")
    trained = stream(model, merge)
    for name, merged in merge.merged_state().items():
        taus = torch.stack([theta[name] - base[name] for theta in trained]).double()
        winner = taus.abs().flip(0).argmax(dim=0)  # the later task wins ties
        expected = base[name].double() + 0.5 * taus.flip(0).gather(0, winner[None])[0]
        torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-7)
    assert merge.num_tasks == 3
    assert same(weights(model), trained[-1]), "the model keeps its training weights"


@pytest.mark.parametrize("policy", ["base", "previous", "merged"])
def test_start_policy_decides_where_a_task_starts(model, policy):
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            starts.append(weights(pl_module))

    starts, base = [], weights(model)
    merge = MergeCallback(TaskArithmetic(scale=0.3), start_policy=policy)
    ends, merged = [], []
    for task in range(3):
        make_trainer(merge, Start()).fit(model, toy_loader(task))
        ends.append(weights(model))
        merged.append(merge.merged_state())
    expected = {"base": [base, base], "previous": ends[:2], "merged": merged[:2]}[policy]
    assert same(starts[0], base)
    assert same(starts[1], expected[0])
    assert same(starts[2], expected[1])


@pytest.mark.parametrize("run", ["test", "validate", "predict"])
def test_evaluation_sees_merged_weights_and_restores(model, run):
    merge = MergeCallback(MagMax(scale=0.5))
    stream(model, merge, 2)
    before = weights(model)
    model.seen.clear()
    getattr(make_trainer(merge), run)(model, toy_loader(9))
    assert set(model.seen) == {float(merge.merged_state()["net.0.weight"].sum())}
    assert same(weights(model), before)


def test_validation_inside_fit_sees_training_weights(model):
    merge = MergeCallback(MagMax(scale=0.5))
    stream(model, merge, 1)
    model.seen.clear()
    make_trainer(merge, num_sanity_val_steps=0, epochs=1).fit(model, toy_loader(1), toy_loader(2))
    assert set(model.seen) == {float(model.net[0].weight.detach().sum())}


def test_an_exception_in_test_restores_the_training_weights(model):
    class Break(Callback):
        def on_test_batch_end(self, *args, **kwargs):
            raise KeyError("stop")

    merge = MergeCallback(MagMax())
    stream(model, merge, 1)
    before = weights(model)
    with pytest.raises(KeyError, match="stop"):
        make_trainer(merge, Break()).test(model, toy_loader(1))
    assert same(weights(model), before)


def test_merged_context_manager_restores_also_after_an_exception(model):
    merge = MergeCallback([MagMax(), TIES()])
    stream(model, merge, 1)
    before = weights(model)

    inside = {}
    with pytest.raises(KeyError, match="stop"), merge.merged(model, "ties"):  # noqa: PT012
        inside.update(weights(model))
        raise KeyError("stop")
    assert same(inside, merge.merged_state("ties"))
    assert same(weights(model), before)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["model", "compiled model"])
def test_a_fit_within_a_block_of_merged_weights_is_refused(model, wrap):
    merge = MergeCallback(MagMax(scale=0.5))
    stream(model, merge, 2)
    before = weights(model)
    with (
        merge.merged(wrap(model)),
        pytest.raises(RuntimeError, match=r"got ForeignModule with merged weights in it.*leave the block first"),
    ):
        make_trainer(merge).fit(model, toy_loader(2))
    assert same(weights(model), before)
    make_trainer(merge).fit(model, toy_loader(2))
    assert merge.num_tasks == 3


def test_another_model_may_be_trained_within_a_block_of_merged_weights(model):
    merge, student = MergeCallback(MagMax(scale=0.5)), copy.deepcopy(model)
    stream(model, merge, 1)
    with merge.merged(model):
        make_trainer(merge).fit(student, toy_loader(1))
    assert merge.num_tasks == 2


@pytest.mark.parametrize("run", ["test", "validate", "predict"])
def test_before_the_first_task_the_model_is_evaluated_as_it_is_and_a_warning_says_so_once(model, run):
    merge = MergeCallback(MagMax())
    with pytest.warns(UserWarning, match=r"got none yet: ForeignModule is evaluated as it is; call load_checkpoint"):
        getattr(make_trainer(merge), run)(model, toy_loader(0))
    assert set(model.seen) == {float(model.net[0].weight.detach().sum())}
    getattr(make_trainer(merge), run)(model, toy_loader(0))  # warnings are errors here: it says it once
    with pytest.raises(RuntimeError, match="at least one merged task"):
        merge.merged_state()


def test_validation_inside_the_first_fit_and_the_unmerged_model_draw_no_warning(model):
    make_trainer(MergeCallback(EMR(), deploy="expert")).test(model, toy_loader(0))
    make_trainer(MergeCallback(EMR())).fit(model, toy_loader(0), toy_loader(1))


@pytest.mark.parametrize("merger", [EMR(), Pipeline(TALL(), sparsifier=Quantise())], ids=["EMR", "pipeline"])
def test_a_rule_with_a_model_per_task_warns_once_that_the_one_for_unknown_tasks_is_evaluated(model, merger):
    merge = MergeCallback({"magmax": MagMax(), "views": merger})
    stream(model, merge, 2)
    trainer = make_trainer(merge)
    trainer.test(model, toy_loader(0))  # MagMax, without a warning
    with merge.merged(model, "views"):
        with pytest.warns(UserWarning, match=r"'views' has a model per task.*mergers\['views'\].task_view\(task\)"):
            trainer.test(model, toy_loader(0))
        trainer.test(model, toy_loader(0))


def test_a_fit_that_trains_nothing_warns_and_merges_nothing(model):
    merge = MergeCallback(MagMax())
    trainer = make_trainer(merge)
    trainer.fit(model, toy_loader(0))
    with pytest.warns(RuntimeWarning, match="trained nothing"):
        trainer.fit(model, toy_loader(1))
    assert merge.num_tasks == 1


class StopError(Exception):
    pass


class StopAt(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise StopError


class StopBeforeMerge(Callback):
    def on_train_end(self, trainer, pl_module):
        raise StopError


@pytest.mark.parametrize("crash", [StopAt(1), StopBeforeMerge()], ids=["mid-task", "between checkpoint and merge"])
def test_resume_from_a_lightning_checkpoint_equals_no_crash(tmp_path, crash):
    def fresh():
        torch.manual_seed(0)
        merge = MergeCallback([MagMax(), TIES(density=0.5)], start_policy="previous")
        checkpoint = ModelCheckpoint(
            tmp_path, filename="last", save_top_k=1, every_n_epochs=1, enable_version_counter=False
        )
        return ForeignModule(), merge, checkpoint

    model, merge, _ = fresh()
    stream(model, merge, 2)

    again, remerge, checkpoint = fresh()
    make_trainer(remerge).fit(again, toy_loader(0))
    with pytest.raises(StopError):
        make_trainer(crash, remerge, checkpoint, enable_checkpointing=True).fit(again, toy_loader(1))
    again, remerge, checkpoint = fresh()  # a new process knows nothing but the checkpoint
    make_trainer(remerge, checkpoint, enable_checkpointing=True).fit(
        again, toy_loader(1), ckpt_path=tmp_path / "last.ckpt"
    )
    assert remerge.num_tasks == 2
    assert same(weights(again), weights(model))
    for name in ("magmax", "ties"):
        assert same(remerge.merged_state(name), merge.merged_state(name))


def test_checkpoints_hold_training_weights_and_load_with_weights_only(model, tmp_path):
    merge = MergeCallback(MagMax())
    stream(model, merge, 1)
    checkpoint = ModelCheckpoint(tmp_path, filename="x", save_top_k=1)
    make_trainer(merge, checkpoint, enable_checkpointing=True, epochs=1).fit(model, toy_loader(1))
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert same({k: v for k, v in found["state_dict"].items()}, weights(model))
    assert found["callbacks"][merge.state_key]["num_tasks"] == 2, "the merge of this fit is in it"


def test_nan_is_refused_before_it_reaches_any_merger(model):
    merge = MergeCallback([TaskArithmetic(), MagMax()])
    stream(model, merge, 1)
    before = {name: merge.merged_state(name) for name in merge.mergers}
    model.lr = float("nan")
    with pytest.raises(RuntimeError, match=r"NaN or Inf in 'net.0.weight'"):
        make_trainer(merge).fit(model, toy_loader(1))
    assert merge.num_tasks == 1
    assert all(same(merge.merged_state(name), before[name]) for name in merge.mergers)


def test_a_model_of_another_shape_is_refused(model):
    merge = MergeCallback(MagMax())
    stream(model, merge, 1)
    model.net[3] = torch.nn.Linear(6, 5)
    with pytest.raises(RuntimeError, match=r"'net.3.weight' of shape \(3, 6\).*got \(5, 6\)"):
        make_trainer(merge).fit(model, toy_loader(1))


def test_a_model_with_more_parameters_is_refused(model):
    merge = MergeCallback(MagMax())
    stream(model, merge, 1)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"'extra.weight'.*exclude="):
        make_trainer(merge).fit(model, toy_loader(1))


def test_a_state_of_another_base_is_refused(model):
    merge = MergeCallback(MagMax())
    stream(model, merge, 1)
    other = MergeCallback(MagMax(), base={k: v + 1 for k, v in merge.base.items()})
    with pytest.raises(RuntimeError, match="different bases cannot be merged"):
        other.load_accumulators(merge.accumulators())


def test_a_state_of_other_mergers_is_refused(model):
    merge = MergeCallback(MagMax())
    stream(model, merge, 1)
    with pytest.raises(RuntimeError, match=r"expected the state of mergers \['ties'\], got \['magmax'\]"):
        MergeCallback(TIES()).load_accumulators(merge.accumulators())


def test_base_can_come_from_a_file(model, tmp_path):
    base = {k: v + 0.25 for k, v in weights(model).items()}
    save_tensors(tmp_path / "base.safetensors", base)
    merge = MergeCallback(TaskArithmetic(scale=1.0), base=tmp_path / "base.safetensors")
    stream(model, merge, 1)
    merged = merge.merged_state()
    for name, value in weights(model).items():
        torch.testing.assert_close(merged[name], value)
    assert same(merge.base, base)


class _Tied(ForeignModule):
    """Its last layer computes with the first one's weights too."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
        self.net[2].weight = self.net[0].weight


def test_tied_parameters_are_merged_once_and_named_twice(tmp_path):
    torch.manual_seed(0)
    model = _Tied()
    merge = MergeCallback(MagMax())
    stream(model, merge, 2)
    state = merge.merged_state()
    assert set(state) == set(model.state_dict()), "it loads strictly"
    assert torch.equal(state["net.2.weight"], state["net.0.weight"])
    assert "net.2.weight" not in merge.task_vector(model)
    save_tensors(tmp_path / "merged.safetensors", state)
    again = MergeCallback(MagMax())
    again.load_accumulators(merge.accumulators())
    assert same(again.merged_state(), state)


def test_a_given_base_may_name_tied_parameters_twice():
    torch.manual_seed(0)
    model = _Tied()
    taken = MergeCallback(MagMax())
    given = MergeCallback(MagMax(), base=dict(model.state_dict()))
    twin = copy.deepcopy(model)
    stream(model, given, 2)
    stream(twin, taken, 2)
    assert given.base_fingerprint == taken.base_fingerprint
    assert same(given.merged_state(), taken.merged_state())


def test_exclude_leaves_a_head_as_it_was_trained(model):
    merge = MergeCallback(MagMax(), exclude=["net.3.*"])
    stream(model, merge, 2)
    assert set(merge.merged_state()) == {"net.0.weight", "net.0.bias"}
    before = weights(model)
    with merge.merged(model):
        assert torch.equal(model.net[3].weight, before["net.3.weight"])
        assert not torch.equal(model.net[0].weight, before["net.0.weight"])


@pytest.mark.parametrize("policy", ["latest", "base", "mean"])
def test_running_statistics_follow_the_named_policy(policy):
    torch.manual_seed(0)
    model = ForeignModule(batch_norm=True)
    start = model.net[1].running_mean.clone()
    merge = MergeCallback(MagMax(), buffers=policy)
    means = []
    for task in range(3):
        make_trainer(merge).fit(model, toy_loader(task))
        means.append(model.net[1].running_mean.clone())
    expected = {"latest": means[-1], "base": start, "mean": torch.stack(means).mean(dim=0)}[policy]
    with merge.merged(model):
        torch.testing.assert_close(model.net[1].running_mean, expected)
    assert torch.equal(model.net[1].running_mean, means[-1])


def test_any_vector_becomes_a_state_with_the_merged_running_statistics(model):
    torch.manual_seed(0)
    model = ForeignModule(batch_norm=True)
    merge = MergeCallback(MagMax(), buffers="mean")
    stream(model, merge, 2)
    state = merge.state_with({"net.0.bias": torch.ones(6)}, model)
    assert torch.equal(state["net.0.bias"], merge.base["net.0.bias"] + 1)
    assert torch.equal(state["net.0.weight"], merge.base["net.0.weight"])
    assert state.keys() - merge.weights_with({}, model).keys() == {"net.1.running_mean", "net.1.running_var"}
    assert same(merge.state_with(merge.mergers["magmax"].compute(), model), merge.merged_state())


def test_folding_kept_vectors_merges_what_the_run_merged(model, tmp_path):
    """Statistics included: they are measured on theta_0 + tau, which the bank gives back."""
    seen = []

    def statistics(module):
        seen.append(weights(module))
        return {"fisher": {name: tensor.abs() for name, tensor in weights(module).items()}}

    ran = MergeCallback([MagMax(), Fisher()], bank=tmp_path, statistics=statistics)
    stream(model, ran)
    again = MergeCallback([MagMax(), Fisher()], base=ran.base, statistics=statistics)
    for tau in TaskVectorBank(tmp_path):
        before = weights(model)
        again.fold(tau, model)
        assert same(weights(model), before)
    for name in ran.mergers:
        assert same(again.merged_state(name), ran.merged_state(name))
    assert all(same(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert set(again.update_seconds) == {"magmax", "fisher"}


def test_task_vectors_are_kept_in_the_bank(model, tmp_path):
    base = weights(model)
    merge = MergeCallback(MagMax(), bank=tmp_path)
    merge.next_task("first", samples=24)
    trained = stream(model, merge, 2)
    bank = TaskVectorBank(tmp_path)
    assert len(bank) == 2
    first = {key: bank.metadata(0)[key] for key in ("name", "steps", "samples")}
    assert first == {"name": "first", "steps": "6", "samples": "24"}  # 2 epochs of 24 images in batches of 8
    assert (bank.metadata(1)["steps"], "samples" in bank.metadata(1)) == ("6", False)
    for task, tau in enumerate(bank):
        for name, value in tau.items():
            assert torch.equal(value, trained[task][name] - base[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_policy": "bases"}, "start_policy to be one of"),
        ({"deploy": "ties"}, "expected deploy to be one of"),
        ({"buffers": "median"}, "buffers to be one of"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MergeCallback(MagMax(), **options)


def test_a_merger_cannot_be_called_what_deploy_calls_the_unmerged_model():
    with pytest.raises(ValueError, match="another name for a merger than 'expert'"):
        MergeCallback({"expert": MagMax()})


def test_a_pattern_that_matches_nothing_is_an_error(model):
    merge = MergeCallback(MagMax(), include=["nett.*"])
    with pytest.raises(ValueError, match="nett"):
        make_trainer(merge).fit(model, toy_loader(0))


def test_spawn_launchers_are_refused(model):
    merge = MergeCallback(MagMax())
    with pytest.raises(RuntimeError, match="strategy='ddp'"):
        merge.setup(make_trainer(merge, strategy="ddp_spawn", devices=2), model, "fit")


def test_deepcopy_gives_an_independent_callback(model):
    merge = MergeCallback(WeightAverage())
    stream(model, merge, 1)
    twin = copy.deepcopy(merge)
    before = merge.merged_state()
    make_trainer(twin).fit(model, toy_loader(1))
    assert (merge.num_tasks, twin.num_tasks) == (1, 2)
    assert same(merge.merged_state(), before)


# LightningCLI's own calls
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_lightning_cli_builds_it_from_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["project"])
    (tmp_path / "config.yaml").write_text(
        textwrap.dedent("""
        model: {class_path: support.tiny.ForeignModule}
        trainer:
          accelerator: cpu
          logger: false
          callbacks:
            - class_path: clmerge.callbacks.MergeCallback
              init_args:
                mergers: {class_path: clmerge.merging.TIES, init_args: {density: 0.3}}
                start_policy: base
                exclude: ["net.3.*"]
        """)
    )
    cli = LightningCLI(
        model_class=ForeignModule,
        subclass_mode_model=True,
        run=False,
        seed_everything_default=0,
        args=["--config", str(tmp_path / "config.yaml")],
    )
    (merge,) = [c for c in cli.trainer.callbacks if isinstance(c, MergeCallback)]
    assert merge.mergers["ties"].settings()["density"] == 0.3
    assert (merge.start_policy, merge.exclude) == ("base", ["net.3.*"])


SCRIPT = """
import sys, torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from support.tiny import ForeignModule, toy_loader
from torch.optim.swa_utils import update_bn
from clmerge.callbacks import MergeCallback
from clmerge.merging import TIES, MagMax
from clmerge.models import add_lora
from clmerge.weights import fingerprint, save_tensors

class Sharded(ForeignModule):
    def configure_model(self):
        if not hasattr(self, "done"):
            for layer in (self.net[0], self.net[3]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            self.done = True

torch.manual_seed(0)
kind, out = sys.argv[1:]
sharded = kind == "fsdp2"
model = Sharded() if sharded else ForeignModule()
if kind.endswith("lora"):
    add_lora(model.net, "weight", rank=2)
merge = MergeCallback([MagMax(), TIES(density=0.5)], start_policy="merged")
for task in range(2):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    trainer = Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy=strategy, callbacks=[merge], logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, toy_loader(task, batch_size=12))  # half of the samples for each rank, in one step
trainer.test(model, toy_loader(5), verbose=False)
inside = model.seen[-1]
if trainer.is_global_zero:
    state = {f"{n}/{k}": v for n in merge.mergers for k, v in merge.merged_state(n).items()}
    save_tensors(out, {**state, "seen": torch.tensor(float(inside))})
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind", ["fsdp2", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("ddp", "ddp lora"))]
)
def test_two_processes_merge_what_one_process_with_the_whole_batch_merges(tmp_path, kind):
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "merged.safetensors"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), kind, str(out)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert out.is_file(), found.stderr[-3000:]

    from clmerge.weights import load_tensors

    torch.manual_seed(0)
    model = ForeignModule()
    if kind.endswith("lora"):
        add_lora(model.net, "weight", rank=2)
    merge = MergeCallback([MagMax(), TIES(density=0.5)], start_policy="merged")
    for task in range(2):
        make_trainer(merge).fit(model, toy_loader(task, batch_size=24))
    merged = load_tensors(out)
    for name in merge.mergers:
        for key, value in merge.merged_state(name).items():
            torch.testing.assert_close(merged[f"{name}/{key}"], value, rtol=1e-4, atol=1e-6)


class _AdamModule(ForeignModule):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_adams_second_moments_and_the_base_come_without_data():
    torch.manual_seed(0)
    model, merge = _AdamModule(), MergeCallback([Fisher(statistic="adam"), Ethos()])
    taus, moments = [], []
    for task in range(2):
        trainer = make_trainer(merge)
        trainer.fit(model, toy_loader(task))
        taus.append({name: p.detach() - merge.base[name] for name, p in model.named_parameters()})
        moments.append({name: trainer.optimizers[0].state[p] for name, p in model.named_parameters()})
    for name, merged in merge.mergers["fisher"].compute().items():
        v = [m[name]["exp_avg_sq"].double().clamp(min=0) / (1 - 0.999 ** float(m[name]["step"])) for m in moments]
        v = [tensor.clamp(min=1e-12) for tensor in v]
        expected = sum(weight * tau[name] for weight, tau in zip(v, taus, strict=True)) / sum(v)
        torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-7)
    assert merge.mergers["ethos"].num_tasks == 2


def test_adams_moments_of_another_optimizer_are_refused(model):
    merge = MergeCallback(Fisher(statistic="adam"))
    with pytest.raises(ValueError, match=r"'net\.0\.weight', got SGD"):
        make_trainer(merge).fit(model, toy_loader(0))
    assert merge.num_tasks == 0


def test_mergers_that_need_all_vectors_read_them_from_the_bank(model, tmp_path):
    twin = copy.deepcopy(model)
    copies = MergeCallback([PCB(0.5), MagMax()])
    merge = MergeCallback([PCB(0.5), MagMax()], bank=tmp_path / "bank")
    stream(twin, copies)
    stream(model, merge)
    assert same(merge.merged_state("pcb"), copies.merged_state("pcb"))
    assert not merge.accumulators()["mergers"]["pcb"]["slots"]
    assert merge.mergers["pcb"].state_size(100, 3) == 0
    resumed = MergeCallback([PCB(0.5), MagMax()], bank=tmp_path / "bank")
    resumed.load_accumulators(merge.accumulators())
    for callback, module in ((copies, twin), (resumed, model)):
        make_trainer(callback).fit(module, toy_loader(3))
    assert same(resumed.merged_state("pcb"), copies.merged_state("pcb"))
    without = MergeCallback([PCB(0.5), MagMax()])
    with pytest.raises(ValueError, match=r"MergeCallback\(bank="):
        without.load_accumulators(merge.accumulators())


@pytest.mark.parametrize(
    ("merger", "message"),
    [
        (
            TaskArithmetic(weights=[1.0]),
            r"merger 'task_arithmetic': expected one entry for each of the 2 tasks in weights",
        ),
        (Pipeline(finisher=GroupScale({"no.such.*": 2.0})), r"merger 'pipeline': .* got 'no\.such\.\*'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_step_is_trained(model, merger, message):
    merge = MergeCallback(merger)
    for _task in range(1 if "weights" in message else 0):
        stream(model, merge, 1)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        stream(model, merge, 1)
    assert same(weights(model), before)


class Callable(ForeignModule):
    def forward(self, x):
        return self.net(x)


def test_running_statistics_are_estimated_again_for_every_merged_model():
    torch.manual_seed(0)
    model = Callable(batch_norm=True)
    merge = MergeCallback([MagMax(), WeightAverage()], buffers="re-estimated")
    for task in range(2):
        make_trainer(merge).fit(model, toy_loader(task))
    latest = model.net[1].running_mean.clone()
    for name in merge.mergers:
        twin = copy.deepcopy(model)
        twin.load_state_dict({**twin.state_dict(), **merge.weights_with(merge.merged_vector(name), model)})
        update_bn(toy_loader(1), twin)  # of the task that was merged last
        with merge.merged(model, name):
            torch.testing.assert_close(model.net[1].running_mean, twin.net[1].running_mean)
            torch.testing.assert_close(model.net[1].running_var, twin.net[1].running_var)
        torch.testing.assert_close(merge.merged_state(name)["net.1.running_var"], twin.net[1].running_var)
        assert not torch.equal(twin.net[1].running_mean, latest)
    assert torch.equal(model.net[1].running_mean, latest)

    again = MergeCallback([MagMax(), WeightAverage()], buffers="re-estimated")
    again.load_state_dict(merge.state_dict())
    assert all(same(again.merged_state(name), merge.merged_state(name)) for name in merge.mergers)


def test_running_statistics_of_a_model_that_is_read_from_the_bank(tmp_path):
    found = []
    for bank in (None, tmp_path):
        torch.manual_seed(0)
        model, merge = Callable(batch_norm=True), MergeCallback(PCB(0.5), buffers="re-estimated", bank=bank)
        for task in range(2):
            make_trainer(merge).fit(model, toy_loader(task))
        found.append(merge.merged_state())
    assert same(*found)


class Convolutional(LightningModule):
    """Batches are dictionaries, in which nobody knows the images but the module."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["pictures"]), batch["digits"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_running_statistics_are_estimated_on_the_images_that_are_given():
    torch.manual_seed(0)
    model, asked = Convolutional(), []
    tasks = [torch.randn(12, 1, 4, 4) + task for task in range(2)]

    def images(module):
        assert module is model
        asked.append(module.net[0].weight.detach().clone())
        return tasks[merge.num_tasks - 1].split(5)

    merge = MergeCallback([MagMax(), WeightAverage()], buffers="re-estimated", images=images)
    for pictures in tasks:
        data = [{"pictures": picture, "digits": index % 2} for index, picture in enumerate(pictures)]
        make_trainer(merge).fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    assert len(asked) == 2 * 2  # every merged model after every task
    for name, weight in zip(merge.mergers, asked[-2:], strict=True):
        merged = merge.merged_state(name)
        torch.testing.assert_close(weight, merged["net.0.weight"])
        convolved = [nn.functional.conv2d(p, weight, merged["net.0.bias"]) for p in tasks[-1].split(5)]
        mean = torch.stack([each.mean(dim=(0, 2, 3)) for each in convolved]).mean(dim=0)
        torch.testing.assert_close(merged["net.1.running_mean"], mean)
        with merge.merged(model, name):
            assert torch.equal(model.net[1].running_mean, merged["net.1.running_mean"])


def test_estimating_statistics_leaves_the_order_of_later_batches_alone():
    def trained(buffers):
        torch.manual_seed(0)
        model = Callable(batch_norm=True)
        merge = MergeCallback(MagMax(), buffers=buffers)
        for task in range(2):
            data = toy_loader(task).dataset
            make_trainer(merge).fit(model, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
        return weights(model)

    assert same(trained("re-estimated"), trained("latest"))


def test_a_module_that_cannot_be_called_is_refused_before_training():
    model = ForeignModule(batch_norm=True)
    before = weights(model)
    with pytest.raises(TypeError, match=r"ForeignModule to have a forward\(inputs\)"):
        stream(model, MergeCallback(MagMax(), buffers="re-estimated"), 1)
    assert same(weights(model), before)


def test_workers_that_train_one_task_each_draw_the_masks_of_their_tasks(model):
    whole, workers = DARE(0.5), []
    for task in range(2):
        mine = copy.deepcopy(model)
        worker = MergeCallback(DARE(0.5))
        worker.next_task(f"task {task}", index=task)
        make_trainer(worker).fit(mine, toy_loader(task))
        whole.update(worker.task_vector(mine), task=task)
        workers.append(worker.mergers["dare"])
    workers[0].merge_state(workers[1])
    assert workers[0].tasks == (0, 1)
    found, expected = workers[0].compute(), whole.compute()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)
    assert all((found[name] == 0).equal(expected[name] == 0) for name in expected)
