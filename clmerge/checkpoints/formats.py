"""Open checkpoints by path: detect the format and choose the set of weights."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from clmerge.checkpoints.adapter import CONFIG, WEIGHTS
from clmerge.checkpoints.choice import KNOWN, choose_set, keep_chosen
from clmerge.checkpoints.class_names import names_in
from clmerge.checkpoints.diffusion_adapter import diffusion_adapter, is_diffusion_adapter
from clmerge.checkpoints.modules import ModulesOf
from clmerge.checkpoints.names import clean_names
from clmerge.checkpoints.peft_adapter import has_factors, peft_adapter, read_config
from clmerge.checkpoints.pickled import StandIn, StoredTensor, UnreadTensor
from clmerge.checkpoints.reader import Checkpoint, TorchCheckpoint
from clmerge.checkpoints.remote import local_path
from clmerge.checkpoints.safetensors_file import SafetensorsCheckpoint
from clmerge.checkpoints.torch_file import TorchFile
from clmerge.files import parse_json
from clmerge.weights.checksums import verify_part
from clmerge.weights.paths import what_it_is

_TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".tar"}
_IN_FOLDERS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ARRAY = "a NumPy array"
_BANK_FILE = re.compile(r"task_\d{3,}\.safetensors")


def open_models(paths: Iterable[str | os.PathLike[str]], weights: str | None = None) -> list[Checkpoint]:
    """Open the models to merge; a run folder or a task-vector bank stands for all of its tasks.

    Args:
        paths: Files and folders.
        weights: Which set is read, as for ``open_checkpoint``.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the format of a path cannot be read.
    """
    found: list[Checkpoint] = []
    for path in map(local_path, paths):
        bank = path / "bank" if (path / "manifest.json").is_file() else path
        if bank.name == "bank":
            verify_part(bank.parent, "bank/")
        elif bank.parent.name == "bank":  # one vector
            verify_part(bank.parent.parent, f"bank/{bank.name}")
        names = [entry.name for entry in bank.iterdir()] if bank.is_dir() else []
        files = [bank / name for name in names if _BANK_FILE.fullmatch(name)]
        if files:
            found += _bank(bank, sorted(files, key=_task_of))
        elif bank != path:
            raise ValueError(
                f"expected a run folder with a task-vector bank, got {path} without one; name its merged models "
                f"({path / 'model'}/NAME.safetensors) instead"
            )
        else:
            found.append(open_checkpoint(path, weights))
    return found


def _task_of(file: Path) -> int:
    return int(file.stem.removeprefix("task_"))


def _bank(folder: Path, files: Sequence[Path]) -> list[Checkpoint]:
    """Open all files of a task-vector bank, in the order of their tasks."""
    if [*map(_task_of, files)] != [*range(len(files))]:
        raise ValueError(
            f"expected the task vectors of all tasks in {folder}, got {', '.join(file.name for file in files[:6])}"
            f"{' and so on' if len(files) > 6 else ''}; put the missing ones back, or name the files to merge"
        )
    found = [open_checkpoint(file) for file in files]
    for file, opened in zip(files, found, strict=True):
        if isinstance(opened, SafetensorsCheckpoint) and opened.metadata.get("task") != str(_task_of(file)):
            raise ValueError(
                f"expected the task vector of task {_task_of(file)} in {file}, got one whose header says task "
                f"{opened.metadata.get('task', '?')[:20]!r}; put the right file there"
            )
    return found


def open_checkpoint(path: str | os.PathLike[str], weights: str | None = None) -> Checkpoint:
    """Open one checkpoint: a file, or a folder in Hugging Face's layout.

    Wrappers (``_orig_mod.`` anywhere, ``module.`` before every name) are removed from the names. No code in a pickle
    is executed: only its containers, primitives and tensors are read.

    Args:
        path: A ``.safetensors`` file, a file of ``torch.save`` (``.pt``, ``.pth``, ``.bin``, Lightning's ``.ckpt``),
            an index of sharded files, or a folder with one of these; a LoRA adapter of PEFT, file or folder, or of
            kohya's scripts or diffusers. Or a URL of one of these, see ``local_path``.
        weights: Which set is read from a file with several: its key in the file, or the first part of its tensors'
            names. Default: averaged weights (``state_dict_ema``, ``model_ema``) if there are any, else
            ``state_dict``, ``model_state_dict``, ``model``, ``module``, ``weights``, or the tensors at the top level.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If the format cannot be read, or the file holds several sets of weights with unknown names.
    """
    path = local_path(path)
    if (kind := what_it_is(path)) not in ("nothing", "file", "folder"):
        raise ValueError(f"expected a checkpoint, a file or a folder, got {path}, which is a {kind}")
    if kind == "nothing":
        raise FileNotFoundError(f"expected a checkpoint, got {path}, which does not exist{_nearest_file(path)}")
    checkpoint = _from_folder(path, weights) if path.is_dir() else _from_file(path, weights)
    if path.is_file() and has_factors(checkpoint.entries) and (path.parent / CONFIG).is_file():
        checkpoint = _with_config(checkpoint, path.parent)
    elif is_diffusion_adapter(checkpoint):
        checkpoint = diffusion_adapter(checkpoint, weights)
    elif path.is_file() and has_factors(checkpoint.entries):
        raise ValueError(f"expected {CONFIG} beside the adapter {path}, got none; copy it there")
    if not checkpoint.entries:
        raise ValueError(f"expected a checkpoint with tensors, got none in {path}")
    clean_names(checkpoint)
    if weights is not None:
        keep_chosen(checkpoint, weights)
        clean_names(checkpoint)
    return checkpoint


def _from_folder(folder: Path, weights: str | None) -> Checkpoint:
    if (folder / CONFIG).is_file():
        for name in WEIGHTS:
            if (folder / name).is_file():
                return _with_config(_from_file(folder / name, weights), folder)
        raise ValueError(
            f"expected one of {', '.join(WEIGHTS)} beside {CONFIG}, got neither in {folder}; copy it there"
        )
    for index in _INDEXES:
        if (folder / index).is_file():
            return _from_index(folder / index, folder, weights)
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            opened = _from_file(folder / name, weights)
            opened.source, opened.kind = str(folder), f"folder with {name}"
            return opened
    found = [file for file in _listed(folder) if file.suffix in {".safetensors", *_TORCH_SUFFIXES}]
    if len(found) == 1:
        return _from_file(found[0], weights)
    names = ", ".join(sorted(file.name for file in found)[:5]) or "no checkpoint at all"
    raise ValueError(
        f"expected a folder with one checkpoint ({', '.join(_IN_FOLDERS)} or an index), got {names} in {folder}; "
        "name the file"
    )


def _with_config(weights: Checkpoint, folder: Path) -> Checkpoint:
    path = folder / CONFIG
    return peft_adapter(weights, read_config(path), str(path), [*weights.files, path])


def _from_file(path: Path, weights: str | None) -> Checkpoint:
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path, [path])
    if path.name.endswith(".index.json"):
        return _from_index(path, path, weights)
    if path.suffix in _TORCH_SUFFIXES:
        return _from_torch(path, [path], weights)
    suffixes = ", ".join((".safetensors", ".index.json", *sorted(_TORCH_SUFFIXES)))
    raise ValueError(f"expected a checkpoint ({suffixes}) or a folder with one, got {path}")


def _from_index(index: Path, source: Path, weights: str | None) -> Checkpoint:
    content = parse_json(index.read_bytes(), str(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"expected an index with a weight_map of names to files, got {index}; copy it again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != index.parent or what_it_is(file) != "file":
            raise ValueError(
                f"expected the shards that {index} lists beside it, got no file {str(file)[-200:]!r}; copy all shards"
            )
    checkpoint: Checkpoint
    if files and files[0].suffix == ".safetensors":
        checkpoint = SafetensorsCheckpoint(source, files, f"safetensors in {len(files)} shards")
    else:
        checkpoint = _from_torch(source, files, weights)
        checkpoint.kind = f"torch.save in {len(files)} shards"
    if missing := [name for name in weight_map if name not in checkpoint.entries]:
        raise ValueError(f"expected {missing[0]!r} in {weight_map[missing[0]]} as {index} says, got a file without it")
    checkpoint.files.append(index)
    return checkpoint


def _from_torch(source: Path, paths: Sequence[Path], weights: str | None) -> Checkpoint:
    files = [TorchFile(path) for path in paths]
    modules = [ModulesOf(file) for file in files]
    chosen = [_chosen(file, weights) for file in files]
    states = [_tensors_of(file, state) for file, (_, state) in zip(files, chosen, strict=True)]
    is_lightning = any("pytorch-lightning_version" in file.content for file in files)
    kind = "Lightning checkpoint" if is_lightning else "torch.jit.save" if files[0].is_script else "torch.save"
    kind += next((f" of a module {one.root}" for one in modules if one.root), "")
    ignored = [path for file, found in zip(files, modules, strict=True) for path in found.others(file.ignored)]
    checkpoint = TorchCheckpoint(source, paths, states, kind, ignored)
    checkpoint.verifiers = {
        name: partial(file.verify, found)
        for file, (_, state) in zip(files, chosen, strict=True)
        for name, found in state.items()
        if isinstance(found, StoredTensor)
    }
    checkpoint.classes = next((found for file in files if (found := _classes(file))), [])
    checkpoint.sets = list(dict.fromkeys(key for file in files for key in _sets(file)))
    if weights_read := chosen[0][0] if chosen else None:
        checkpoint.weights = weights_read
        others = ", ".join(repr(key) for key in checkpoint.sets if key != weights_read)
        checkpoint.kind += f", under {weights_read!r}" + (f" (there are also {others})" if others else "")
    return checkpoint


def _chosen(file: TorchFile, weights: str | None) -> tuple[str | None, Mapping[Any, Any]]:
    """Return the key in the file of the chosen state dict, and the state dict."""
    loaded, sets = file.content, _sets(file)
    if (key := choose_set(sets, weights)) is not None:
        return key, loaded[key]
    if isinstance(loaded, Mapping) and _holds_tensors(loaded):
        return None, loaded
    advice = f"choose one with --weights {next(iter(sets))}" if sets else "save the state_dict() of the model"
    parts = [loaded, *loaded.values()] if isinstance(loaded, Mapping) else []
    if not sets and any(
        _kind_of(value) == _ARRAY for part in parts if isinstance(part, Mapping) for value in part.values()
    ):
        advice = "save tensors in place of the arrays, as torch.from_numpy gives them"
    what = _kind_of(loaded)
    if isinstance(loaded, Mapping) and loaded:
        what += (
            f" with {', '.join(sorted(f'{str(key)[:40]} ({_kind_of(value)})' for key, value in loaded.items())[:5])}"
        )
    raise ValueError(
        f"expected a state dict in {file.path}, alone or under one of {', '.join(KNOWN)}, got {what}; {advice}"
    )


def _kind_of(value: object) -> str:
    """Return what a value in a file is, in words."""
    if not isinstance(value, StandIn):
        return type(value).__name__
    return _ARRAY if re.fullmatch(r"numpy\..*_reconstruct", value.path) else f"an object of {value.path}"


def _classes(file: TorchFile) -> list[str]:
    """Return the names of classes that a file holds beside its weights, also among hyper-parameters."""
    content = file.content if isinstance(file.content, Mapping) else {}
    inner = [value for value in content.values() if isinstance(value, Mapping) and not _holds_tensors(value)]
    return next((found for part in (content, *inner) if (found := names_in(part))), [])


def _sets(file: TorchFile) -> list[str]:
    """Return the names under which a file holds mappings with tensors."""
    content = file.content if isinstance(file.content, Mapping) else {}
    items = ((key, value) for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping))
    return [key for key, value in items if _holds_tensors(value)]


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(name, str) and isinstance(value, StoredTensor | UnreadTensor) for name, value in state.items()
    )


def _tensors_of(file: TorchFile, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, UnreadTensor):
            raise ValueError(
                f"expected dense tensors in {file.path}, got {name!r}, which is kept as {value.how}; save it dense"
            )
        if isinstance(name, str) and isinstance(value, StoredTensor):
            try:
                found[name] = file.tensor(value)
            except ValueError as error:
                raise ValueError(f"{error} (of {name!r})") from error
    return found


def _listed(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []


def _nearest_file(path: Path) -> str:
    parent = path.parent
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1) if parent.is_dir() else []
    return f"; the nearest there is {parent / near[0]}" if near else ""
