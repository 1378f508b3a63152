import math

import pytest
import torch
from support.small_runs import learned_run, text_run

from clmerge import load_run
from clmerge.cli.open_run import open_run
from clmerge.deploy.predictors import Merged, PerTask
from clmerge.weights import load_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make.__name__: make(tmp_path_factory.mktemp(make.__name__)) for make in (text_run, learned_run)}


def same(found, expected):
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("which", ["text_run", "learned_run"])
def test_every_model_is_the_one_that_fit_evaluated(folders, which):
    run, _ = open_run(str(folders[which]), name="run", merges_again=False)
    assert run.models.names == run.results.models
    rows = {}
    for names in (run.models.names, list(reversed(run.models.names))):  # in any order, after any other
        predictors = {name: run.predictor(name) for name in names}
        rows |= run.evaluate_again("again", predictors, len(run.tasks) - 1)
        for name, row in rows.items():
            for setting, found in row.items():
                assert same(found, run.results.matrix(name, setting)[-1].tolist()), (name, setting)


def test_the_head_is_that_of_the_end(folders):
    run, _ = open_run(str(folders["learned_run"]), name="run", merges_again=False)
    run.predictor("magmax")
    kept = load_tensors(run.folder.path / "state" / "task_001" / "module.safetensors")
    head = {name: tensor for name, tensor in run.module.state_dict().items() if name.startswith("head.")}
    assert head.keys() == {name for name in kept if name.startswith("head.")}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in head.items())


def test_a_merger_is_found_by_its_class_and_others_are_refused(folders):
    run, _ = open_run(str(folders["text_run"]), name="run")
    assert run.models.resolve("MagMax") == "magmax"
    assert isinstance(run.predictor("EMR"), PerTask)
    with pytest.raises(ValueError, match=r"expected one of the models magmax, emr, .*got 'tise'"):
        run.predictor("tise")


def test_task_vectors_are_needed_to_merge_again_only(folders):
    with pytest.raises(ValueError, match="expected the task vectors of all 2 tasks"):
        open_run(str(folders["learned_run"]), name="run")


def test_without_the_stream(folders):
    loaded = load_run(folders["text_run"])
    run, _ = open_run(str(folders["text_run"]), name="run")
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tasks = torch.tensor([0, 1, 1, 0])
    backbone = run.module.backbone.eval()

    def features(model):
        def compute(state):
            with torch.no_grad():
                return torch.func.functional_call(model, state, (images,))

        return compute

    plain = backbone.model.visual
    for name in ("magmax", "emr", "magmax+tuned"):
        predictor, own = loaded.predictor(name), run.predictor(name)
        assert isinstance(predictor, PerTask if name == "emr" else Merged)
        assert own.needs_task == predictor.needs_task
        assert predictor.prepare(lambda make: make()) == set(backbone.model.state_dict())
        own.prepare(lambda make: make())

        def of_visual(state):
            return features(plain)({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")})

        def of_module(state):
            return features(backbone)({k.removeprefix("backbone."): v for k, v in state.items() if "backbone" in k})

        assert torch.equal(predictor.scores(of_visual, tasks), own.scores(of_module, tasks)), name
    with pytest.raises(ValueError, match="got 'expert'"):
        loaded.predictor("expert")
