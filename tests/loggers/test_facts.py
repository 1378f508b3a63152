import re

import pytest

from clmerge.loggers import describe_run
from clmerge.loggers.facts import flatten

CONFIG = {
    "config": ["x.yaml"],
    "run_dir": "runs/x",
    "resume": None,
    "name": "run",
    "seed": 7,
    "stream": {
        "class_path": "clmerge.streams.ClassIncremental",
        "init_args": {"num_tasks": 5, "source": {"class_path": "clmerge.streams.SklearnDigits"}},
    },
    "model": {
        "backbone": {"class_path": "clmerge.models.OpenClip", "init_args": {"name": "nano", "pretrained": None}},
        "head": None,
        "tuning": None,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.999]}},
    },
    "mergers": [
        {"class_path": "clmerge.merging.TIES", "init_args": {"density": 0.1}},
        {"class_path": "clmerge.merging.MagMax", "init_args": {"scale": 0.5}},
        {"class_path": "clmerge.merging.TIES", "init_args": {"density": 0.2}},
    ],
    "learner": {"start_policy": "base"},
    "logging": {"tags": ["mine"], "project": "p"},
    "trainer": {"max_epochs": 3},
}
MERGERS = ["ties_density0.1", "magmax", "ties"]


def describe(**changes):
    return describe_run({**CONFIG, **changes}, stream="digits-5", num_tasks=5, mergers=MERGERS)


def test_what_filters_need_has_a_readable_key():
    settings = describe().settings
    assert list(settings)[:8] == [
        "stream",
        "scenario",
        "num_tasks",
        "method",
        "tuning",
        "start_policy",
        "backbone",
        "seed",
    ]
    assert list(settings.values())[:8] == [
        "digits-5",
        "ClassIncremental",
        5,
        "ties_density0.1+magmax+ties",
        "full",
        "base",
        "nano",
        7,
    ]


def test_the_whole_configuration_is_flat():
    settings = describe().settings
    assert settings["stream/source"] == "SklearnDigits"
    assert settings["model/optimizer"] == "AdamW"
    assert settings["model/optimizer/lr"] == 0.001
    assert settings["model/optimizer/betas"] == [0.9, 0.999]
    assert settings["model/head"] is None
    assert settings["trainer/max_epochs"] == 3
    assert settings["mergers"] == ["TIES", "MagMax", "TIES"]
    assert settings["mergers/MagMax/scale"] == 0.5
    assert settings["mergers/TIES 1/density"] == 0.1
    assert settings["mergers/TIES 3/density"] == 0.2
    assert not any(isinstance(value, dict) for value in settings.values())
    assert not any("class_path" in key or "init_args" in key for key in settings)
    assert not any(key.startswith(("logging", "run_dir", "resume", "config")) for key in settings)


def test_name_group_and_tags():
    facts = describe()
    assert facts.name == "digits-5 ties_density0.1+magmax+ties full base s7"
    assert re.fullmatch(r"digits-5 ties_density0\.1\+magmax\+ties full base [0-9a-f]{6}", facts.group)
    assert facts.tags == ["ClassIncremental", "full", "base", *MERGERS]
    assert describe(name="mine").name.startswith("mine ties")
    assert describe(seed=8).group == facts.group
    assert describe(seed=8).name != facts.name


def test_a_group_holds_the_repetitions_of_one_experiment_and_nothing_else():
    def group(**changes):
        return describe(**changes).group

    stream, optimizer = CONFIG["stream"], CONFIG["model"]["optimizer"]
    same = [
        {"seed": 8},
        {"stream": {**stream, "init_args": {**stream["init_args"], "seed": 8}}},
        {"trainer": {"max_epochs": 3, "devices": 2, "accelerator": "gpu"}, "data": {"num_workers": 4}},
        {"logging": {"project": "q"}, "run_dir": "elsewhere"},
    ]
    assert {group(**changes) for changes in same} == {group()}
    others = [
        {"model": {**CONFIG["model"], "optimizer": {**optimizer, "init_args": {"lr": 0.002, "betas": [0.9, 0.999]}}}},
        {"model": {**CONFIG["model"], "regularizers": [{"class_path": "clmerge.training.regularizers.EWC"}]}},
        {"trainer": {"max_epochs": 4}},
        {"stream": {**stream, "init_args": {**stream["init_args"], "num_tasks": 2}}},
        {"data": {"replay": 500}},
        {"mergers": CONFIG["mergers"][:2]},
    ]
    assert len({group(), *(group(**changes) for changes in others)}) == 1 + len(others)


def test_many_mergers_do_not_make_a_long_name():
    facts = describe_run(CONFIG, stream="digits-5", num_tasks=5, mergers=list("abcdef"))
    assert facts.group.rpartition(" ")[0] == "digits-5 a+b+c+3 more full base"
    assert facts.settings["method"] == "a+b+c+d+e+f"


def test_tags_are_not_longer_than_allowed_and_come_once():
    facts = describe_run(CONFIG, stream="s", num_tasks=1, mergers=["full", "m" * 90])
    assert facts.tags == ["ClassIncremental", "full", "base", "m" * 64]


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        (None, "full"),
        ({"class_path": "clmerge.models.Full"}, "full"),
        ({"class_path": "clmerge.models.Partial", "init_args": {"scope": "attention"}}, "partial-attention"),
        ({"class_path": "clmerge.models.Partial", "init_args": {"scope": ["a.*", "b.*"]}}, "partial"),
        ({"class_path": "clmerge.models.LoRA", "init_args": {"rank": 4}}, "lora"),
    ],
)
def test_tuning(tuning, expected):
    facts = describe(model={"tuning": tuning})
    assert facts.settings["tuning"] == expected
    assert f" {expected} " in facts.name


def test_a_backbone_without_a_name_is_known_by_its_class():
    assert describe(model={"backbone": {"class_path": "my.Own"}}).settings["backbone"] == "Own"


def test_flatten_keeps_plain_lists_and_tells_unnamed_dictionaries_apart():
    assert flatten({"a": (1, 2), "b": [], "c": {"d": {"e": None}}}) == {"a": [1, 2], "b": [], "c/d/e": None}
    assert flatten({"a": [{"x": 1}, {"x": 2}]}) == {"a/1/x": 1, "a/2/x": 2}
