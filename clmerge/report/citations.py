"""Papers behind the mergers, for BibTeX: titles and authors as arXiv has them."""

from collections.abc import Iterable
from typing import NamedTuple


class Paper(NamedTuple):
    """A paper on arXiv."""

    title: str
    authors: tuple[str, ...]


PAPERS: dict[str, Paper] = {}


def bibtex(sources: Iterable[str]) -> str:
    """Return BibTeX entries for arXiv ids, each once, in order.

    Args:
        sources: arXiv ids. One whose title is not in ``PAPERS`` gets an entry with its id alone: nothing is made up.
    """
    return "\n\n".join(_entry(source) for source in dict.fromkeys(sources))


def _entry(source: str) -> str:
    paper = PAPERS.get(source)
    year = "20" + source[:2]
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors)} if paper else {}
    fields |= {"year": year, "eprint": source, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{source}"}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{_key(source, paper)},", *lines, "}"])


def _key(source: str, paper: Paper | None) -> str:
    if paper is None:
        return f"arxiv{source}"
    family = paper.authors[0].split()[-1].lower()
    word = next((w for w in paper.title.replace("-", " ").split() if len(w) > 3), "paper").strip(":,").lower()
    return f"{family}20{source[:2]}{word}"
