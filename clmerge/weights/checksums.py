"""Checksums of the files that a run has committed, to detect later changes."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from clmerge.files import parse_json
from clmerge.shapes import keyed, record, text

MANIFEST = "manifest.json"


def checksum(path: str | os.PathLike[str]) -> str:
    """Return a checksum of a file: BLAKE2b in 32 hexadecimal digits, twice as fast as SHA-256.

    Args:
        path: The file.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Check that files are unchanged since a run committed them.

    Args:
        folder: The run folder.
        files: Checksums by path, relative to the folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file was changed; the message names it.
    """
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"expected {file}, as the run has committed it, got no such file; put it back")
        if checksum(file) != expected:
            raise ValueError(
                f"expected {file} as the run has committed it, got other content: it was damaged, changed or "
                "exchanged; put the file of this run back"
            )


def verify_part(folder: Path, part: str) -> None:
    """Check a part of a folder that may be a run folder, of any version of clmerge.

    Args:
        folder: The folder; without a manifest nothing is checked.
        part: Prefix of the file names to check, for example ``bank/``; empty for all.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file was changed, or the manifest is damaged.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    try:
        found = parse_json(manifest.read_bytes(), "something else")
        record({}, {"files": keyed(text)})(found, "")
    except ValueError as error:
        raise ValueError(f"expected the manifest of a run, got {manifest}, which is damaged: {error}") from error
    kept = {name: value for name, value in found.get("files", {}).items() if name.startswith(part)}
    verify_files(folder, kept)
