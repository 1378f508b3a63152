"""What a merge was made from, as an in-toto statement with SLSA provenance that other tools read and sign."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from clmerge.checkpoints.adapter import CONFIG
from clmerge.checkpoints.ledger import ADAPTER, INDEX, Ledger, ledger_file, read_ledger
from clmerge.checkpoints.writer import sha256_of
from clmerge.files import write_json_atomic

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
SUFFIX = ".intoto.json"
BUILDER = "urn:clmerge"  # a name of the program, not an address; docs/provenance.md says what its statements hold
_CACHED = re.compile(r"models--(.+)/snapshots/([0-9a-f]{40})/(.+)")


def attestation_path(out: str | os.PathLike[str]) -> Path:
    """Return the file of the statement about a merged file or folder: beside it, ``NAME.intoto.json``."""
    out = Path(out)
    return out.with_name(out.name + SUFFIX)


def attest(out: str | os.PathLike[str], *, started: datetime | None = None) -> Path:
    """Write the statement about a merged file or folder beside it; return its file.

    Args:
        out: A result of ``clmerge merge``.
        started: When the merge began; default not said.

    Raises:
        FileNotFoundError: If there is no merged file.
        ValueError: If it has no ledger, or one without SHA-256.
    """
    file = attestation_path(out)
    finished = datetime.now(UTC)
    write_json_atomic(file, merge_statement(out, started=started, finished=finished))
    return file


def merge_statement(
    out: str | os.PathLike[str], *, started: datetime | None = None, finished: datetime | None = None
) -> dict[str, Any]:
    """Return the statement about a merged file or folder: its ledger in the words of in-toto and SLSA.

    It has no absolute path: inputs below the folder of the statement are told by relative path, those in Hugging Face's
    cache by repository and commit, others by name; their SHA-256 decides.

    Args:
        out: A result of ``clmerge merge``.
        started: When the merge began.
        finished: When it ended.

    Raises:
        FileNotFoundError: If there is no merged file.
        ValueError: If it has no ledger, or one without SHA-256.
    """
    ledger = read_ledger(out)
    if any(file.sha256 is None for file in ledger.files):
        raise ValueError(f"expected a ledger with SHA-256 to attest {out}, got one of --no-hash; merge without it")
    folder = attestation_path(out).absolute().parent
    materials = [
        {
            **described(file.path, folder, file.sha256 or ""),
            **({"annotations": {"weights": file.weights}} if file.weights else {}),
        }
        for file in ledger.files
    ]
    return statement(
        [described(file, folder, sha256_of(file)) for file in _outputs(Path(out), ledger)],
        "merge",
        external=_recipe(ledger, folder),
        internal={"threads": ledger.threads, "estimated": ledger.estimated},
        materials=materials,
        versions=ledger.versions,
        started=started,
        finished=finished,
    )


def statement(
    subjects: Iterable[Mapping[str, Any]],
    kind: str,
    *,
    external: Mapping[str, Any],
    internal: Mapping[str, Any],
    materials: Iterable[Mapping[str, Any]],
    versions: Mapping[str, Any],
    started: datetime | None = None,
    finished: datetime | None = None,
) -> dict[str, Any]:
    """Return an in-toto Statement v1 with SLSA provenance v1.

    Args:
        subjects: What was made, as resource descriptors.
        kind: How it was made: ``merge`` or ``fit``.
        external: What the user chose.
        internal: What else the result depends on.
        materials: What it was made from, as resource descriptors.
        versions: Versions of the packages.
        started: When the making began.
        finished: When it ended.
    """
    times = {"startedOn": started, "finishedOn": finished}
    return {
        "_type": STATEMENT,
        "subject": list(subjects),
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{BUILDER}:{kind}:v1",
                "externalParameters": dict(external),
                "internalParameters": dict(internal),
                "resolvedDependencies": list(materials),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {key: str(value) for key, value in versions.items()}},
                "metadata": {
                    key: time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                    for key, time in times.items()
                    if time is not None
                },
            },
        },
    }


def described(path: str | os.PathLike[str], folder: Path, sha256: str) -> dict[str, Any]:
    """Return the resource descriptor of a file.

    Args:
        path: The file.
        folder: Folder of the statement.
        sha256: Its SHA-256.
    """
    return {**place(path, folder), "digest": {"sha256": sha256}}


def place(path: str | os.PathLike[str], folder: Path) -> dict[str, str]:
    """Return where a file or folder is, without an absolute path: ``name``, and ``uri`` where others can follow it.

    Args:
        path: The file or folder.
        folder: Folder of the statement.
    """
    absolute = Path(path).absolute()
    if found := _CACHED.search(absolute.as_posix()):
        repository, commit, file = found.groups()
        return {"name": file, "uri": f"pkg:huggingface/{repository.replace('--', '/')}@{commit}#{file}"}
    if absolute.is_relative_to(folder):
        relative = absolute.relative_to(folder).as_posix()
        return {"name": relative, "uri": relative}
    return {"name": absolute.name}


def _recipe(ledger: Ledger, folder: Path) -> dict[str, Any]:
    """Return what the user chose: the ledger's settings, with places in place of paths."""
    left_out = ("base", "models", "files", "threads", "versions", "result_sha256", "shards", "schema", "estimated")
    found = {key: value for key, value in asdict(ledger).items() if key not in (*left_out, "alignment", "diagnostics")}
    found["base"] = place(ledger.base, folder)
    found["models"] = [place(model, folder) for model in ledger.models]
    if ledger.alignment is not None:
        found["alignment"] = ledger.alignment.get("aligner")  # its maps are in the ledger
    without: dict[str, Any] = without_paths({key: value for key, value in found.items() if value not in (None, [], {})})
    return without


def without_paths(value: Any) -> Any:
    """Return JSON values with the last part in place of every absolute path, also inside of a sentence.

    Example:
        >>> without_paths({"images": "8 images of /home/me/runs/digits"})
        {'images': '8 images of digits'}
    """
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if PurePath(value).is_absolute():
        return PurePath(value).name
    return re.sub(r"(?<!\S)/\S*/(\S+)", r"\1", value)


def _outputs(out: Path, ledger: Ledger) -> list[Path]:
    """Return the files of a merged file or folder."""
    holder = ledger_file(out)
    if holder.name == INDEX:
        return [holder.parent / name for name in (*ledger.shards, INDEX)]
    return [holder, holder.parent / CONFIG] if holder.name == ADAPTER else [holder]
