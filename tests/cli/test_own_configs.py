from pathlib import Path

from clmerge.cli.own_configs import use_own_configs

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_config_of_the_package_is_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = str(CONFIGS / "quickstart.yaml")
    words = ["--config", "configs/quickstart.yaml", "--config=configs/methods/magmax.yaml", "--seed", "1"]
    found = use_own_configs(words)
    assert found == ["--config", own, f"--config={CONFIGS / 'methods' / 'magmax.yaml'}", "--seed", "1"]
    assert f"config    {own}, of the package" in capsys.readouterr().err


def test_files_that_exist_and_names_of_nothing_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("seed: 1")
    words = ["--config", "configs/quickstart.yaml", "--config=configs/quickstrat.yaml", "--config"]
    assert use_own_configs(words) == words
    assert capsys.readouterr().err == ""
