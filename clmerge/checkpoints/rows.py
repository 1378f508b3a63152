"""What the rows of a head or a vocabulary stand for: names of classes or tokens that files carry."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clmerge.checkpoints.class_names import in_order, names_in
from clmerge.checkpoints.reader import Checkpoint
from clmerge.files import parse_json


def row_names(checkpoint: Checkpoint, count: int) -> list[str]:
    """Return the names of ``count`` rows, of classes or tokens, that a checkpoint or its folder says; else none.

    Args:
        checkpoint: The checkpoint.
        count: How many rows there are.

    Raises:
        ValueError: If a name stands for two rows, or a file of names is damaged.
    """
    folder = Path(checkpoint.source)
    candidates: list[list[str]] = [checkpoint.classes]
    if folder.is_dir():
        for file, read in (("config.json", names_in), ("tokenizer.json", _tokens), ("vocab.json", _vocabulary)):
            content = parse_json((folder / file).read_bytes(), str(folder / file)) if (folder / file).is_file() else {}
            if isinstance(content, dict):
                added = _added(folder) if file == "vocab.json" else {}
                candidates.append(read({**content, **added}))
    found = next((names for names in candidates if len(names) == count), [])
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"expected every row of {checkpoint.source} to have a name of its own, got {twice!r} twice")
    return found


def _added(folder: Path) -> dict[str, Any]:
    file = folder / "added_tokens.json"
    content = parse_json(file.read_bytes(), str(file)) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _tokens(content: Mapping[Any, Any]) -> list[str]:
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            found[token["content"]] = token.get("id")
    return _vocabulary(found)


def _vocabulary(content: Mapping[Any, Any]) -> list[str]:
    return in_order([(index, name) for name, index in content.items()])
