"""``clmerge merge``: merge checkpoints of any size into one safetensors file."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clmerge.cli.messages import complain
from clmerge.cli.signals import Stopped
from clmerge.names import tell

if TYPE_CHECKING:
    from clmerge.checkpoints.groups import Group
    from clmerge.cli.parser import CommandParser

USAGE = """\
clmerge merge --base B --models A1 A2 ... --merger RULE --out FILE [options]
       clmerge merge --recipe FILE [options]
       clmerge merge --verify FILE_OR_FOLDER [--key PUBLIC.pem]"""
EPILOG = """\
examples:
  clmerge merge --base base.safetensors --models a.pt b.pt --merger TIES --merger.density=0.2 --out merged.safetensors
  clmerge merge --base base.safetensors --models runs/digits --merger MagMax --out merged.safetensors
  clmerge merge --base base/ --models a/ b/ --merger TIES --out merged --shard-size 5GB
  clmerge merge --base base.safetensors --models adapter_a/ adapter_b/ --merger TIES --lora-rank 16 --out adapter
  clmerge merge --base base.safetensors --models a.pt b.pt --merger TIES --dry-run
  clmerge merge --base a.safetensors --models a.safetensors b.safetensors --origin zero --merger WeightAverage \\
      --align WeightMatching --data configs/quickstart.yaml --out merged.safetensors
  clmerge merge --merger.help TIES
  clmerge merge --verify merged.safetensors
  clmerge merge --verify merged.safetensors --key public.pem
"""


def build_parser() -> "CommandParser":
    """Return the parser of ``clmerge merge``; imports torch."""
    from clmerge.alignment import Aligner
    from clmerge.checkpoints.heads import Heads
    from clmerge.checkpoints.vectors import Origin
    from clmerge.cli.named_code import set_policy
    from clmerge.cli.parser import CommandFormatter, CommandParser, known_subclasses
    from clmerge.merging import Finisher, Merger, Sparsifier
    from clmerge.weights.buffers import Buffers

    set_policy()
    CommandParser.class_names = known_subclasses((Merger, Sparsifier, Finisher, Aligner))
    parser = CommandParser(
        prog="clmerge merge",
        usage=USAGE,
        description="Merge checkpoints of any size into one safetensors file, one parameter at a time.",
        epilog=EPILOG,
        formatter_class=CommandFormatter,
        allow_abbrev=False,
    )
    recipe_help = "A YAML file with any of the options below, or a recipe of mergekit."
    groups_help = (
        "Rules for groups of tensors, in a recipe: a list of match (glob patterns) and merger (a rule; null keeps the "
        "base's). The first group that matches counts; --merger is for the rest, which without it is the base's."
    )
    origin_help = "Merge what was added to the base, or with zero the weights themselves."
    dtype_help = "Floating-point dtype of the result, such as bfloat16 (default: the base's)."
    models_help = (
        "Fine-tuned models in the order of their tasks: .safetensors, .pt, .pth, .bin, Lightning .ckpt, Hugging Face "
        "folders, PEFT's LoRA adapters, clmerge run folders and task-vector banks (all their tasks)."
    )
    include_help = "Glob patterns of tensors to merge (default: all floating-point ones)."
    exclude_help = "Glob patterns of tensors to copy from the base instead, for example 'head.*'."
    strict_help = "Refuse missing, extra and mismatched tensors, which are otherwise copied from the base."
    without_help = (
        "Tasks to leave out of those of --models, by name or index as --dry-run lists them: what merging the others "
        "gives, exactly, by any rule."
    )
    weights_help = (
        "Which set of weights is read of files that hold several, such as state_dict or ema_model (default: averaged "
        "weights if there are some: state_dict_ema, model_ema; then state_dict, model and the like)."
    )
    buffers_help = (
        "Running statistics of batch normalisation: those of the latest model, of the base (default), their mean over "
        "the models, or re-estimated with the merged weights on training images."
    )
    data_help = (
        "A configuration of clmerge fit whose model and training images (of its last task) --align and --buffers "
        "re-estimated take (default of the latter: those of the run that is the last of --models)."
    )
    align_help = (
        "Carry models that did not start from the base's weights into the base's units first: WeightMatching, or "
        "ActivationMatching, which looks at the images of --data. The barriers before and after are printed and kept."
    )
    lora_rank_help = (
        "Write --out, a folder, as one LoRA adapter of PEFT whose products have this rank at most, in place of dense "
        "weights; all of --models must be adapters. Exact where the merged matrices have no higher rank; the share of "
        "their energy that is kept is printed."
    )
    heads_help = (
        "Class heads and vocabularies whose sizes differ: those of the base (default, with a warning), the union of "
        "their rows by class name or token, those of the first model that has them, or none (drop)."
    )
    allow_help = (
        "Packages beside clmerge, torch, Lightning, timm, open_clip, avalanche, torchvision and torchmetrics whose "
        "code the configuration of --data may name; that code is run."
    )
    no_hash_help = "Leave the SHA-256 of inputs and result out of the ledger, which then says so."
    shard_help = "Write --out as a folder in Hugging Face's layout, in files of at most this size, for example 5GB."
    attestation_help = (
        "Also write OUT.intoto.json beside the result: what it was made from, as an in-toto statement with SLSA "
        "provenance."
    )
    key_help = "With --verify: also check the signature of clmerge sign by this public key, a file in PEM."
    signature_help = "With --key: the signature (default: FILE.sig)."
    threads_help = "Threads that merge; another one computes the SHA-256 meanwhile."
    parser.add_argument("--recipe", action="config", help=recipe_help)
    parser.add_argument("--base", type=str | None, default=None, help="The base model, in any format of --models.")
    parser.add_argument("--models", type=str, nargs="+", default=[], help=models_help)
    parser.add_subclass_arguments(Merger, "merger", help="The rule, by class name.", required=False)
    parser.add_argument("--groups", type=Any, default=[], help=groups_help)  # each is read by _groups
    parser.add_argument("--origin", type=Origin, default="base", help=origin_help)
    parser.add_argument("--dtype", type=str | None, default=None, help=dtype_help)
    parser.add_argument("--out", type=str | None, default=None, help="The safetensors file to write, or the folder.")
    parser.add_argument("--shard-size", type=str | None, default=None, help=shard_help)
    parser.add_argument("--heads", type=Heads | None, default=None, help=heads_help)
    parser.add_argument("--lora-rank", type=int | None, default=None, help=lora_rank_help)
    parser.add_argument("--include", type=str, nargs="+", default=[], help=include_help)
    parser.add_argument("--exclude", type=str, nargs="+", default=[], help=exclude_help)
    parser.add_argument("--without", type=str, nargs="+", default=[], metavar="TASK", help=without_help)
    parser.add_argument("--weights", type=str | None, default=None, help=weights_help)
    parser.add_argument("--buffers", type=Buffers | None, default=None, help=buffers_help)
    parser.add_subclass_arguments(Aligner, "align", help=align_help, required=False)
    parser.add_argument("--data", type=str | None, default=None, help=data_help)
    parser.add_argument("--allow", type=str, nargs="+", default=[], metavar="PACKAGE", help=allow_help)
    parser.add_argument("--strict", action="store_true", help=strict_help)
    parser.add_argument(
        "--dry-run", action="store_true", help="Print what would be done and what it takes; write nothing."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the output if it exists.")
    parser.add_argument("--no-hash", action="store_true", help=no_hash_help)
    parser.add_argument("--attestation", action="store_true", help=attestation_help)
    parser.add_argument("--threads", type=int, default=1, help=threads_help)
    parser.add_argument(
        "--verify", type=str | None, default=None, help="Replay this file's ledger, compare bit for bit."
    )
    parser.add_argument("--key", type=str | None, default=None, metavar="FILE", help=key_help)
    parser.add_argument("--signature", type=str | None, default=None, metavar="FILE", help=signature_help)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge merge``; return the exit code."""
    from clmerge.checkpoints.ledger import MOST_THREADS

    parser = build_parser()
    try:
        arguments = [*_translated(argv)]
    except (ValueError, OSError) as error:
        return complain("merge", error)
    config = parser.parse_args(arguments)
    defaults = parser.get_defaults()
    for option in (
        "models",
        "groups",
        "origin",
        "include",
        "exclude",
        "without",
        "allow",
        "strict",
        "dry_run",
        "overwrite",
        "no_hash",
        "attestation",
    ):
        if config[option] is None and defaults[option] is not None:
            parser.error(f"expected a value of {option}, got null; leave it out for its default")
    if config.threads is None or not 1 <= config.threads <= MOST_THREADS:
        parser.error(f"expected --threads from 1 to {MOST_THREADS}, got {config.threads}")
    try:
        groups = _groups(parser, config.groups)
    except (ValueError, TypeError) as error:
        return complain("merge", error)
    if config.verify is None:
        needed = {"--base": config.base, "--models": config.models, "--merger": config.merger or config.groups}
        if not config.dry_run:
            needed["--out"] = config.out
        if missing := [option for option, value in needed.items() if not value]:
            parser.error(f"expected --base, --models, --merger and --out (or --dry-run), got no {', '.join(missing)}")
        if config.align and not config.data:
            parser.error("expected --data with --align, a configuration whose model is that of the files, got none")
        if (config.data or config.allow) and config.buffers != "re-estimated" and not config.align:
            parser.error(
                "expected --data and --allow with --align or --buffers re-estimated, got neither; leave them out"
            )
        if config.key or config.signature:
            parser.error("expected --key and --signature with --verify, which checks them, got them without")
        if config.attestation and config.no_hash:
            parser.error("expected SHA-256 with --attestation, which names files by them, got --no-hash; leave it out")
    elif config.base or config.models or config.merger or config.out or config.attestation:
        parser.error("expected --verify alone, since the file says how it was made, got other options beside it")
    elif config.signature and not config.key:
        parser.error("expected --key with --signature, the public key that checks it, got none")
    try:
        with _modules_left_alone():
            if config.verify is not None:
                return _verify(config.verify, config.key, config.signature)
            return _merge(parser, config, groups)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return complain("merge", error)
    except Stopped as stop:
        stop.hint = "nothing was written"
        raise


def _translated(argv: Sequence[str]) -> Iterator[str]:
    """Replace a mergekit recipe among the arguments by the equivalent options."""
    import json

    from clmerge.bounded_yaml import read_yaml
    from clmerge.checkpoints.mergekit import from_mergekit, is_mergekit

    before = ""
    for argument in argv:
        option, _, path = argument.partition("=")
        is_recipe = (before == "--recipe" or option == "--recipe") and Path(path or argument).is_file()
        before = argument
        if not is_recipe:
            yield argument
            continue
        file = path or argument
        recipe = read_yaml(Path(file))
        if not is_mergekit(recipe):
            yield argument
            continue
        try:
            content = json.dumps(from_mergekit(recipe))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"cannot do what the recipe {file} of mergekit says: {error}") from error
        yield f"--recipe={content}" if path else content


def _merge(parser: "CommandParser", config: Any, groups: "list[Group]") -> int:
    import torch

    from clmerge.checkpoints.attestation import attest, attestation_path
    from clmerge.checkpoints.merge import CheckpointMerge
    from clmerge.checkpoints.output import existing, parse_size

    torch.set_num_threads(config.threads)
    _keep_freed_memory()
    shard_bytes = None if config.shard_size is None else parse_size(config.shard_size)
    kind: Literal["file", "shards", "adapter"] = "file" if shard_bytes is None else "shards"
    kind = kind if config.lora_rank is None else "adapter"
    there = None if config.out is None else existing(config.out, kind)
    if there is not None and not config.overwrite and not config.dry_run:
        raise FileExistsError(f"expected a new file, got {there}, which exists; name another or pass --overwrite")
    if config.attestation and config.out is not None and not config.overwrite and not config.dry_run:
        statement = attestation_path(config.out)
        if statement.exists():
            raise FileExistsError(
                f"expected a new file for --attestation, got {statement}, which exists; pass --overwrite"
            )
    made = parser.instantiate(config)
    estimation = alignment = None
    if made.align is not None:
        from clmerge.cli.estimation import open_alignment

        alignment = open_alignment(made.align, config.data, config.allow)
    if config.buffers == "re-estimated":
        from clmerge.cli.estimation import open_estimation

        estimation = open_estimation(config.models, config.data, config.allow)
    job = CheckpointMerge(
        config.base,
        models=config.models,
        merger=made.merger,
        groups=groups,
        origin=config.origin,
        dtype=config.dtype,
        include=config.include,
        exclude=config.exclude,
        strict=config.strict,
        without=config.without,
        weights=config.weights,
        buffers=config.buffers,
        estimation=estimation,
        heads=config.heads,
        lora_rank=config.lora_rank,
        alignment=alignment,
    )
    print(job.describe(), flush=True)
    for row in job.policy.problems:
        tell(f"clmerge merge: warning: {len(row.names)} {row.action}, {row.reason}: {row.names[0]}")
    if config.dry_run:
        return 0
    started = datetime.now(UTC)
    with progress("merging", job.work) as on_bytes:
        job.run(config.out, hashes=not config.no_hash, shard_bytes=shard_bytes, on_bytes=on_bytes)
    if job.adapter is not None:
        tell(job.adapter.report(), file=sys.stdout)
    tell(f"wrote   {config.out}", file=sys.stdout)
    if config.attestation:
        tell(f"wrote   {attest(config.out, started=started)}", file=sys.stdout)
    return 0


def _groups(parser: "CommandParser", said: object) -> "list[Group]":
    """Build the groups of a recipe one by one: jsonargparse would copy the whole list for every item."""
    from jsonargparse import ArgumentError

    from clmerge.checkpoints.groups import Group
    from clmerge.cli.parser import CommandParser

    if not isinstance(said, list):
        parser.error(f'Parser key "groups":\n  Expected a list. Got value: {said}')
    one = CommandParser(prog=parser.prog, exit_on_error=False)
    one.add_class_arguments(Group)
    groups = []
    for index, group in enumerate(said):
        where = f'Parser key "groups[{index}]":\n'
        if not isinstance(group, dict):
            parser.error(f"{where}Expected match and merger. Got value: {group}")
        where += f"Problem with given class_path '{Group.__module__}.{Group.__name__}':\n"
        try:
            groups.append(Group(**one.instantiate(one.parse_object(group))))
        except ArgumentError as error:
            parser.error(f"{where}{error}")
    return groups


def _verify(path: str, key: str | None, signature: str | None) -> int:
    from clmerge.checkpoints.signing import check_signature, signature_path
    from clmerge.checkpoints.verify import verify

    signed = signature_path(path) if signature is None else Path(signature)
    if key is not None:
        if (wrong := check_signature(path, key, signed)) is not None:
            tell(f"clmerge merge: {wrong}")
            tell(f"{path} is NOT what was signed", file=sys.stdout)
            return 1
        tell(f"{path} is what {signed} signs with {key}", file=sys.stdout)
    elif signed.exists():
        tell(f"clmerge merge: {signed} was not checked: --key names the public key of its owner")
    with progress("verifying", None) as on_bytes:
        differences, ledger = verify(path, on_bytes=on_bytes)
    for line in differences:
        tell(f"clmerge merge: {line}")
    if differences:
        tell(f"{path} is NOT what its ledger says", file=sys.stdout)
        return 1
    if ledger.estimated:
        shown = ", ".join(ledger.estimated[:3]) + (
            f" and {len(ledger.estimated) - 3} more" * (len(ledger.estimated) > 3)
        )
        tell(
            f"not replayed: {len(ledger.estimated)} running statistics, from {ledger.images}: {shown}", file=sys.stdout
        )
    hashed = "" if all(file.sha256 for file in ledger.files) else " (its ledger has no SHA-256 of the inputs)"
    rest = " but for what images gave" if ledger.estimated else ""
    tell(f"{path} is what its ledger says, bit for bit{rest}{hashed}", file=sys.stdout)
    return 0


@contextlib.contextmanager
def _modules_left_alone() -> Iterator[None]:
    """Exclude the objects of imported modules from garbage collection during the block.

    Otherwise they are traversed again for every few hundred tensor names, which takes as long as merging tens of
    thousands of small tensors.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _keep_freed_memory() -> None:
    """Let malloc reuse freed memory: a merge allocates the same sizes repeatedly, and new pages take time."""
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


@contextlib.contextmanager
def progress(action: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr: a bar with bytes per second on a terminal, else a line per quarter and at the end.

    Args:
        action: Label of the bar.
        total: Bytes to read; None if unknown.
    """
    import time

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    started = time.perf_counter()
    count = 0

    if console.is_terminal:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
            task = bar.add_task(action, total=total)

            def advance(piece: int) -> None:
                nonlocal count
                count += piece
                bar.advance(task, piece)

            yield advance
    else:

        def add(piece: int) -> None:
            nonlocal count
            quarter = 4 * count // (total or sys.maxsize)
            count += piece
            if total and quarter < 4 * count // total < 4:
                print(f"{action}: {100 * count // total} %", file=sys.stderr, flush=True)

        yield add
    seconds = time.perf_counter() - started
    speed = f"{count / 1e6:,.1f} MB in {seconds:.1f} s, {count / 1e6 / max(seconds, 1e-9):,.0f} MB/s"
    print(f"{action}: {speed}", file=sys.stderr, flush=True)
