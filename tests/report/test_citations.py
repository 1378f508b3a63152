import re

from clmerge.deploy.calibration import Calibration
from clmerge.deploy.routing import Routing
from clmerge.merging import registered_mergers
from clmerge.report.citations import PAPERS, bibtex


def test_every_paper_gives_a_whole_entry_of_its_own():
    text = bibtex(PAPERS)
    entries = text.split("\n\n")
    assert len(entries) == len(PAPERS)
    keys = [re.match(r"@misc\{([a-z0-9]+),\n", entry)[1] for entry in entries]
    assert len(set(keys)) == len(keys)
    for entry, source in zip(entries, PAPERS, strict=True):
        assert entry.count("{") == entry.count("}")
        assert f"  eprint = {{{source}}}," in entry
        assert f"  year = {{20{source[:2]}}}," in entry


def test_a_paper_that_is_not_known_gets_no_title_and_no_authors():
    assert bibtex(["9912.00001", "9912.00001"]).splitlines()[:2] == ["@misc{arxiv9912.00001,", "  year = {2099},"]
    assert "title" not in bibtex(["9912.00001"])


def kinds_of(kind):
    return {kind}.union(*(kinds_of(each) for each in kind.__subclasses__()))


def test_the_papers_are_those_of_rules_routings_and_calibrations():
    rules = {*registered_mergers().values(), *kinds_of(Routing)}
    own = {rule.source for rule in rules if rule.__module__.startswith("clmerge.")}
    own |= {source for one in kinds_of(Calibration) for source in one.sources}
    assert PAPERS.keys() == own - {""}
