"""Which revision of a hub's model was loaded, from what the download left in the cache."""

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")


def cached_revision(repository: str, cache_dir: str | None = None) -> str:
    """Return the commit of a model of Hugging Face's hub as it was last downloaded; empty if that is not known.

    Args:
        repository: ``ORG/MODEL``, or ``ORG/MODEL@REVISION``.
        cache_dir: Folder of the cache; default that of ``huggingface_hub``.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name, _, revision = repository.strip("/").partition("@")
    if _COMMIT.fullmatch(revision):
        return revision
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    file = folder / "refs" / (revision or "main")
    found = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return found if _COMMIT.fullmatch(found) else ""
