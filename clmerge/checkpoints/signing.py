"""Sign files with a key, and check signatures, by OpenSSF's model signing; without a network."""

import os
import re
from pathlib import Path
from types import ModuleType

_EXTRA = "expected the packages model-signing and pyopenssl to {what}, got none: pip install 'clmerge[signing]'"


def signature_path(path: str | os.PathLike[str]) -> Path:
    """Return where the signature of a file or folder is by default: beside it, ``NAME.sig``."""
    path = Path(os.path.abspath(path))  # noqa: PTH100  of "folder/." the name of the folder, and links as they are
    return path.with_name(path.name + ".sig")


def sign(path: str | os.PathLike[str], key: str | os.PathLike[str], signature: str | os.PathLike[str]) -> None:
    """Sign a file, or all files of a folder.

    The signature is a Sigstore bundle with the SHA-256 of every file; ``model_signing verify key`` checks it, too.

    Args:
        path: The file or folder.
        key: A private key in PEM on the curve P-256, P-384 or P-521, without a password.
        signature: The file to write.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the extra ``signing`` is not installed, or this is no such key.
    """
    path, signature = Path(path), Path(signature)
    signing, hashing = _module("signing", "sign"), _module("hashing", "sign")
    _check(path, key)
    ignored = [signature] if signature.absolute().is_relative_to(path.absolute()) else []
    config = hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)
    try:
        signer = signing.Config().set_hashing_config(config).use_elliptic_key_signer(private_key=Path(key))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected a private key in PEM on P-256, P-384 or P-521 without a password in {key}, got: {_line(error)}"
        ) from error
    signer.sign(path, signature)


def check_signature(
    path: str | os.PathLike[str], key: str | os.PathLike[str], signature: str | os.PathLike[str]
) -> str | None:
    """Check that a file or folder is what the owner of a key has signed.

    Args:
        path: The file or folder.
        key: The public key in PEM.
        signature: The file that ``sign`` wrote.

    Returns:
        What differs, with the names of the files; None if nothing does.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the extra ``signing`` is not installed, or this is no public key.
    """
    path, signature = Path(path), Path(signature)
    verifying = _module("verifying", "check a signature")
    _check(path, key)
    if not signature.is_file():
        raise FileNotFoundError(f"expected the signature of {path} in {signature}, got no such file")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=Path(key))
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a public key in PEM in {key}, got: {_line(error)}") from error
    try:
        verifier.verify(path, signature)
    except Exception as error:  # those of the library, of the signature's JSON and of cryptography share no base
        return f"{path} is not what {signature} signs with {key}: {_difference(error, path.name)}"
    return None


def _difference(error: Exception, name: str) -> str:
    """Return which files differ, in the words of model-signing but without the bytes of their hashes.

    Args:
        error: What model-signing raised.
        name: Name of what was signed, which a single file has there in place of a dot.
    """
    text = str(error).replace("\\'", "'")  # it shows a list of sentences, in which quotes are escaped
    if not text:  # of cryptography
        return "the signature is of another key or of other content"
    found = {
        "changed": [name if each == "." else each for each in re.findall(r"Hash mismatch for '([^']+)'", text)],
        "missing": re.findall(r"Missing files in model '[^']*': ([^'\"]+)", text),
        "not signed": re.findall(r"Extra files found in model '[^']*': ([^'\"]+)", text),
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names) or _line(error)


def _check(path: Path, key: str | os.PathLike[str]) -> None:
    if not path.exists():
        raise FileNotFoundError(f"expected a file or folder, got {path}, which does not exist")
    if not Path(key).is_file():
        raise FileNotFoundError(f"expected a key in PEM, got {key}, which is no file")


def _module(name: str, what: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(f"model_signing.{name}")
    except ImportError as error:
        raise ValueError(_EXTRA.format(what=what)) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
