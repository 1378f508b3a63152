import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread
from support.run_folders import config_of, write_run

from clmerge.report import read_study, write_report
from clmerge.report.diagnostics import diagnostic_figures
from clmerge.report.figures import common_figures
from clmerge.report.page import make_views, render_page

SETTINGS = ("task_agnostic", "task_aware")
FIGURES = {"average_accuracy", "matrices", "forgetting_curves", "bytes_kept", "bytes_growth"}


VOID = {"meta", "input"}


class Elements(HTMLParser):
    """All elements of a page with their attributes; checks that they are nested well."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag, **wanted):
        return [
            a
            for t, a in self.found
            if t == tag and all(a.get(k.rstrip("_").replace("_", "-")) == v for k, v in wanted.items())
        ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    document = write_run(folder / "run", names="<b>task</b> {}")
    files = write_report(read_study([folder / "run"]), folder / "out" / "report.html", title="R & <D>")
    return document, files, files[-1].read_text(encoding="utf-8")


def rendered(*folders):
    study = read_study(folders)
    return render_page(
        study, make_views(study), common_figures(study), diagnostic_figures(study), title="made up", folder="figures"
    )


def rows(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_figure_is_on_the_page_and_beside_it(page):
    _, files, text = page
    names = {file.name for file in files}
    assert names == {f"{n}.{e}" for n in FIGURES for e in ("csv", "png")} | {"models.csv", "report.html"}
    for file in files:
        if file.suffix == ".png":
            assert min(imread(file).shape[:2]) > 200
    elements = Elements(text)
    ids = {attributes["id"] for attributes in elements.of("section") if "id" in attributes}
    by_setting = {f"{setting}-{name}" for setting in SETTINGS for name in FIGURES - {"bytes_growth"}}
    assert ids == by_setting | {"bytes_growth", "ledger", "cite"}
    assert len(elements.of("table", class_="sortable")) == 2
    heats = [a for a in elements.of("svg") if a.get("class") == "heat"]
    assert len(heats) == 2 * 3  # both mergers and the expert


def test_the_table_agrees_with_the_results_to_the_last_digit(page):
    document, files, text = page
    shown = [a["data-value"] for a in Elements(text).of("td") if a.get("data-column") == "average_accuracy"]
    wanted = [
        repr(document["models"][model][setting]["average_accuracy"][-1])
        for setting in SETTINGS
        for model in ("magmax", "ties", "expert", "zero_shot")
    ]
    assert shown == wanted
    for setting, file in zip(SETTINGS, [f for f in files if f.name == "models.csv"], strict=True):
        for row in rows(file):
            figures = document["models"][row["model"]][setting]
            assert float(row["forgetting"]) == figures["forgetting"]
            assert float(row["backward_transfer"]) == figures["backward_transfer"]
            assert [float(row[f"task_{t}"]) for t in (1, 2, 3)] == figures["R"][-1]


def test_charts_agree_with_the_results(page):
    document, files, text = page
    elements = Elements(text)

    def tips(kind, what):
        return {a["data-tip"] for a in elements.of(kind) if what in a.get("data-tip", "")}

    assert tips("path", ", on task ") == {
        f"{name}, after task {after + 1}, on task {task}: {100 * value:.2f} %"
        for name in ("magmax", "ties", "expert")
        for setting in SETTINGS
        for after, row in enumerate(document["models"][name][setting]["R"])
        for task, value in zip(document["tasks"], row, strict=True)
    }
    columns = {
        f"{name}, after task {after + 1}: {100 * value:.2f} %"
        for name, found in document["models"].items()
        for setting in SETTINGS
        for after, row in enumerate(found[setting]["R"])
        for value in row
    }
    assert columns <= tips("path", ", after task ") | tips("circle", ", after task ")
    matrices = next(file for file in files if file.name == "matrices.csv")
    for row in rows(matrices):
        column = document["tasks"].index(row["on task"])
        own = document["models"][row["panel"]]["task_agnostic"]["R"]
        assert float(row["accuracy"]) == own[int(row["after task"]) - 1][column]


def test_what_files_say_is_escaped_and_the_page_asks_for_nothing(page):
    _, _, text = page
    assert "<b>task" not in text
    assert "&lt;b&gt;task&lt;/b&gt; 1" in text
    assert "<title>R &amp; &lt;D&gt;</title>" in text
    elements = Elements(text)
    assert [a["src"] for _, a in elements.found if "src" in a] == []
    assert {a["href"].split(",")[0] for _, a in elements.found if "href" in a} == {"data:text/csv;charset=utf-8"}
    assert not re.search(r"@import|url\(", text)


def test_the_page_says_how_far_to_trust_it(page, tmp_path):
    assert "One run (seed 0)" in page[2]
    for seed in (0, 1):
        config = config_of(seed=seed)
        write_run(tmp_path / f"s{seed}", config=config, shift=0.05 * seed, finished=2)
    text = rendered(tmp_path / "s0", tmp_path / "s1")
    assert "Mean of 2 runs (seeds 0, 1)" in text
    assert "s0 is not finished: 2 of 3 tasks were evaluated." in text
    assert Elements(text).of("path", fill_opacity="0.15")  # bands


def test_the_page_of_one_model_and_one_task_is_whole(tmp_path):
    write_run(tmp_path / "run", finished=1, models=("magmax",), bank=False)
    text = rendered(tmp_path / "run")
    assert "needs two finished tasks" in text
    Elements(text)
    assert not re.search(r"\bnan\b|\bNone\b", re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.S))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_opens_the_page_without_an_error_and_sorts(page, tmp_path, width):
    document, _, text = page
    probe = """<script>
      const sortable = document.querySelector(".task_agnostic .sortable");
      sortable.querySelectorAll("thead button")[2].click();
      const figure = document.getElementById("task_agnostic-average_accuracy");
      figure.querySelector(".legend button").click();
      figure.querySelector(".line .dot").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
      document.title = JSON.stringify({
        ready: document.documentElement.dataset.ready,
        order: [...sortable.tBodies[0].rows].map((row) => row.cells[0].dataset.value),
        shown: [...document.querySelectorAll("section svg")].filter((svg) => svg.clientWidth > 0).length,
        wide: document.documentElement.scrollWidth > innerWidth,
        focused: [...figure.querySelectorAll(".line.focus")].map((line) => line.dataset.entry),
        last: [...figure.querySelectorAll("svg.chart")].map((svg) => svg.lastChild.dataset.entry),
        tip: document.getElementById("tip").textContent,
      });
    </script>"""
    # The page's own policy allows its own script alone; the probe is let in.
    text = re.sub(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", text)
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        f"file://{tmp_path / 'probe.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    forgetting = {m: f["task_agnostic"]["forgetting"] for m, f in document["models"].items()}
    assert found["ready"] == "true"
    assert found["order"] == sorted(forgetting, key=forgetting.get, reverse=True)
    assert found["shown"] > 10
    assert found["focused"] == found["last"] == ["magmax", "magmax"]  # in both panels, and in front
    assert re.fullmatch(r"\w+, after task 1: \d+\.\d\d %", found["tip"])
    assert not found["wide"]
