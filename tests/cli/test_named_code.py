"""A configuration is read without running what it names, but for classes of the kind that is expected."""

import sys

import pytest
import yaml
from jsonargparse import ArgumentError, Namespace

from clmerge.cli import main
from clmerge.cli.fit import build_parser, trainer_factory
from clmerge.cli.named_code import importing_only, refuse_functions, refused_path
from clmerge.cli.open_run import open_run

STREAM = {"class_path": "ClassIncremental", "init_args": {"source": "SklearnDigits", "num_tasks": 2}}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported, and another when its function is called."""
    (tmp_path / "stranger.py").write_text(
        "from pathlib import Path\n"
        "from torch.optim import SGD\n"
        "HERE = Path(__file__).parent\n"
        "(HERE / 'imported').touch()\n"
        "def function(command: str = ''):\n"
        "    (HERE / 'called').touch()\n"
        "class Own(SGD):\n"
        "    pass\n"
        "class Other:\n"
        "    def __init__(self, params=None):\n"
        "        (HERE / 'called').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("stranger", None)


def fit(tmp_path, capsys, **config):
    """Return exit code and message of a fit of this configuration, which must not start."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stream": STREAM, **config}))
    try:
        code = main(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(tmp_path / "run")])
    except SystemExit as error:
        code = error.code
    assert not (tmp_path / "run").exists()
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def parser():
    parser = build_parser()
    parser.exit_on_error = False
    return parser


def refusal(parser, key, value):
    group, _, name = key.partition(".")
    config = {group: {name: value} if name else value}
    with pytest.raises(ArgumentError) as caught:
        parser.parse_object({**config, "model": {"backbone": "OpenClip"} | config.get("model", {})})
    return refused_path(str(caught.value))


def test_a_command_is_no_optimizer_and_is_not_run(tmp_path, capsys):
    trace = tmp_path / "trace"
    optimizer = {"class_path": "os.system", "init_args": {"command": f"touch {trace}"}}
    code, message = fit(tmp_path, capsys, model={"optimizer": optimizer})
    assert code == 2
    assert not trace.exists()
    assert "got os.system at model.optimizer; it was not imported" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.optimizer", "os.system"),
        ("model.optimizer", {"class_path": "posix.system", "init_args": {"command": "true"}}),
        ("model.optimizer", {"class_path": "torch.os.system", "init_args": {"command": "true"}}),
        ("model.optimizer", {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}),
        ("model.optimizer", {"class_path": "builtins.exec"}),
        ("model.backbone", {"class_path": "os.system", "init_args": {"command": "true"}}),
        ("mergers", [{"class_path": "subprocess.Popen", "init_args": {"args": "true"}}]),
        ("logging.extra", [{"class_path": "os.system", "init_args": {"command": "true"}}]),
        ("trainer.callbacks", [{"class_path": "os.system", "init_args": {"command": "true"}}]),
        ("trainer.callbacks", [{"class_path": "LambdaCallback", "init_args": {"on_test_start": "os.abort"}}]),
        ("trainer.plugins", [{"class_path": "os.system", "init_args": {"command": "true"}}]),
        ("trainer.profiler", {"class_path": "os.system", "init_args": {"command": "true"}}),
        ("trainer.strategy", {"class_path": "os.system", "init_args": {"command": "true"}}),
    ],
)
def test_no_argument_takes_a_command(parser, key, value):
    path, found = refusal(parser, key, value)
    assert path.split(".")[0] in ("os", "posix", "torch", "subprocess", "builtins")
    assert found.startswith(key)


def test_a_function_of_ones_own_module_is_not_called(plugin, capsys):
    optimizer = {"class_path": "stranger.function", "init_args": {"command": "x"}}
    code, message = fit(plugin, capsys, model={"optimizer": optimizer, "backbone": "OpenClip"})
    assert code == 1
    assert "expected a class at model.optimizer, got class_path 'stranger.function', which is a function" in message
    assert not (plugin / "called").exists()


def test_a_class_of_another_kind_is_not_built(parser, plugin):
    with pytest.raises(ArgumentError, match=r"stranger\.Other' to be a subclass of .*Optimizer"):
        parser.parse_args(["--model.backbone=OpenClip", "--model.optimizer.class_path=stranger.Other"])
    assert not (plugin / "called").exists()


def test_a_subclass_of_ones_own_is_a_plug_in(parser, plugin):
    arguments = ["--model.optimizer=stranger.Own", "--model.optimizer.lr=0.5"]
    config = parser.parse_args(["--model.backbone=OpenClip", *arguments])
    assert config.model.optimizer.class_path == "stranger.Own"


def test_a_callback_of_the_trainer_is_built_by_the_same_rule(parser, plugin):
    config = parser.parse_args(["--model.backbone=OpenClip", "--trainer.callbacks=[{class_path: LambdaCallback}]"])
    config.trainer.callbacks[0] = Namespace(class_path="stranger.function")
    with importing_only(["torch"]), pytest.raises(ArgumentError, match="Importing 'stranger"):
        trainer_factory(config)
    assert not (plugin / "imported").exists()


@pytest.mark.parametrize("allow", [(), ("elsewhere",)])
def test_the_run_of_a_stranger_is_opened_without_importing_what_it_names(plugin, allow):
    run = plugin / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"schema": 1, "finished": true}')
    optimizer = {"class_path": "stranger.Own", "init_args": {"lr": 0.1}}
    (run / "config.yaml").write_text(yaml.safe_dump({"stream": STREAM, "model": {"optimizer": optimizer}}))
    with pytest.raises(ValueError, match=r"run/config\.yaml, got stranger\.Own at model\.optimizer.*--allow stranger"):
        open_run(str(run), name="run", allow=allow)
    assert not (plugin / "imported").exists()


def test_what_is_allowed_is_imported(plugin):
    run = plugin / "run"
    run.mkdir()
    (run / "manifest.json").write_text('{"schema": 1}')
    optimizer = {"class_path": "stranger.Own", "init_args": {"lr": 0.1}}
    config = {"stream": STREAM, "model": {"optimizer": optimizer, "backbone": "OpenClip"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="expected a finished run"):
        open_run(str(run), name="run", allow=["stranger"])
    assert (plugin / "imported").exists()


def test_the_restriction_ends(parser):
    outside = {"class_path": "collections.OrderedDict"}
    with importing_only(["clmerge"]):
        assert refusal(parser, "model.optimizer", outside) == ("collections.OrderedDict", "model.optimizer")
    assert refusal(parser, "model.optimizer", outside) is None  # imported, and refused for what it is


def test_python_tags_of_yaml_are_not_followed(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {tmp_path}/trace']\n")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert not (tmp_path / "trace").exists()
    assert "python/object/apply:os.system" in capsys.readouterr().err


def test_functions_are_found_at_any_depth():
    config = Namespace(a=[{"class_path": "torch.optim.SGD", "init_args": Namespace(b={"class_path": "torch.relu"})}])
    with pytest.raises(ValueError, match=r"class at a\[0\]\.init_args\.b, got class_path 'torch\.relu'"):
        refuse_functions(config)
    refuse_functions({"class_path": "never.imported"})
    assert refused_path("anything else") is None
