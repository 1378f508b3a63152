"""Build model and training images from a run or a configuration, for ``clmerge merge``."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from clmerge.alignment import Aligner
    from clmerge.checkpoints.alignment import Alignment
    from clmerge.checkpoints.estimation import Estimation
    from clmerge.models import Backbone


def open_estimation(models: Sequence[str], data: str | None, allow: Sequence[str]) -> "Estimation":
    """Build the model and the stream that running statistics are estimated with.

    Args:
        models: Paths of the merged models; without ``data`` the last must be a run folder.
        data: A configuration of ``clmerge fit``; only its stream and model are used.
        allow: Packages, beside the known ones, whose code a configuration may name.

    Raises:
        FileNotFoundError: If the configuration does not exist.
        ValueError: If there is neither ``data`` nor a run folder, or the configuration names code of other packages.
    """
    from clmerge.lightning_compat import quiet_lightning

    quiet_lightning()
    if data is not None:
        return _of_config(Path(data), allow)
    if not (Path(models[-1]) / "manifest.json").is_file():
        raise ValueError(
            f"expected a run folder as the last of --models for --buffers re-estimated, got {models[-1]}; name a "
            "configuration of `clmerge fit` with --data"
        )
    return _of_run(models[-1], allow)


def _of_run(path: str, allow: Sequence[str]) -> "Estimation":
    from clmerge.checkpoints.estimation import Estimation
    from clmerge.cli.open_run import open_run

    run, _ = open_run(path, name=path, allow=allow)
    run.module.to(run.device)
    last = run.tasks[-1]
    number = min(run.config["learner"]["statistics_images"], len(run.stream.dataset(last.index, "train")))
    what = _in_words(number, last.name, path)
    return Estimation(run.module.backbone, lambda: run.images(last.index), what)


def open_alignment(aligner: "Aligner", data: str, allow: Sequence[str]) -> "Alignment":
    """Build the architecture of the models, and images of the stream if there is one.

    Args:
        aligner: Finds the maps of units.
        data: A configuration of ``clmerge fit``; only its stream and model are used.
        allow: Packages, beside the known ones, whose code a configuration may name.

    Raises:
        FileNotFoundError: If the configuration does not exist.
        ValueError: If the aligner needs images and there is no stream.
    """
    from clmerge.checkpoints.alignment import MatchedAlignment
    from clmerge.lightning_compat import quiet_lightning

    quiet_lightning()
    backbone, images, what = _configured(Path(data), allow)
    return MatchedAlignment(backbone, aligner, images, what, part="model")


def _of_config(file: Path, allow: Sequence[str]) -> "Estimation":
    from clmerge.checkpoints.estimation import Estimation

    backbone, images, what = _configured(file, allow)
    if images is None:
        raise ValueError(f"expected a configuration of `clmerge fit` with a stream for --data, got {file} without one")
    return Estimation(backbone, images, what)


def _configured(file: Path, allow: Sequence[str]) -> "tuple[Backbone, Callable[[], Iterator[Tensor]] | None, str]":
    """Return the backbone of a configuration, what yields images of the last task of its stream, and both in words."""
    from lightning.pytorch import seed_everything

    from clmerge.cli.fit import build_parser, leave_unreadable_out, trainer_factory
    from clmerge.cli.open_run import read_config
    from clmerge.statistics.measure import training_images

    if not file.is_file():
        raise FileNotFoundError(f"expected a configuration of `clmerge fit` for --data, got {file}, which is no file")
    parser = build_parser()
    config = read_config(parser, file, [], allow)
    seed_everything(config.seed, workers=True, verbose=False)
    objects = parser.instantiate(config)
    stream, module, data = objects.stream, objects.model, objects.data
    if stream is None:
        return module.backbone, None, str(file)
    data.seed = config.seed
    leave_unreadable_out(stream, config, None)
    data.setup_stream(stream, module.backbone.train_transform, module.backbone.eval_transform)
    options = {"logger": False, "callbacks": [], "plugins": [], "enable_checkpointing": False}
    trainer = trainer_factory(config)(**options, enable_model_summary=False, enable_progress_bar=False)
    module.to(trainer.strategy.root_device)
    last = stream.tasks[-1]
    number = min(config.learner.statistics_images, len(stream.dataset(last.index, "train")))

    def images() -> Iterator["Tensor"]:
        return training_images(module, data, last.index, num_images=number, seed=config.seed)

    return module.backbone, images, _in_words(number, last.name, str(file))


def _in_words(number: int, task: str, where: str) -> str:
    return f"{number} training images of task {task} of {where}"
