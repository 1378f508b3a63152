"""Image encoders by name: open_clip and timm models, from their hubs, from a file or from a local folder."""

import difflib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.names import align_names
from clmerge.checkpoints.reader import describe
from clmerge.models.hub import cached_revision
from clmerge.weights.modes import eval_mode

Transform = Callable[[Image], Tensor]
NANO = Path(__file__).parent / "nano_clip"
_SOURCES = ("local-dir:", "hf-hub:")
_NUMPY = (".npz", ".npy")  # checkpoints of JAX models, which open_clip converts itself


class Backbone(nn.Module, ABC):
    """An image encoder with its transforms.

    Attributes:
        model: The wrapped model under its own parameter names; saved weights load strictly into it.
        feature_dim: Number of features ``D`` per image.
        train_transform: PIL image to tensor, for training.
        eval_transform: PIL image to tensor, for validation and test.
        default_trainable: Glob patterns of ``model``'s parameters that are trained by default.
        starts_random: For a model with random weights, how to start from pretrained ones; empty otherwise.
        encoder: Path in ``model`` of the module that ``forward`` calls; empty for ``model`` itself.
        read: Description of the weights read from a checkpoint file; empty without one.
        name: Name of the model in its library; empty for a backbone of one's own.
        hub: Repository of the hub that the weights are from, ``ORG/MODEL``; empty if they are from elsewhere.
        revision: Commit of this repository; empty if that is not known.
    """

    name: str = ""
    hub: str = ""
    revision: str = ""

    default_trainable: ClassVar[tuple[str, ...]] = ("*",)
    encoder: ClassVar[str] = ""
    starts_random: str = ""
    read: str = ""
    model: nn.Module
    feature_dim: int
    train_transform: Transform
    eval_transform: Transform

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode images of shape ``(B, 3, H, W)`` into features of shape ``(B, D)``, not normalised."""

    def _note_hub(self, repository: str, cache_dir: str | None = None) -> None:
        """Record which repository of the hub the weights are from, and its commit."""
        repository = repository.strip("/")
        if repository.count("/") == 1:
            self.hub, self.revision = repository.partition("@")[0], cached_revision(repository, cache_dir)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode ``N`` prompts into features of shape ``(N, D)``, not normalised.

        Raises:
            TypeError: For a backbone without a text tower.
        """
        raise TypeError(
            f"expected a backbone with a text tower for a zero-shot head, got {type(self).__name__}; "
            "use OpenClip, or a LinearHead or CosineHead"
        )

    def logit_scale(self) -> float:
        """Return the factor from cosine similarity to logits that the model was pretrained with."""
        return 100.0


class OpenClip(Backbone):
    """A CLIP model of open_clip; by default only its image tower is trained.

    Args:
        name: An open_clip model name (``ViT-B-16-quickgelu``), ``local-dir:FOLDER`` or ``hf-hub:ORG/MODEL``,
            or ``nano``: the small CLIP that is part of clmerge and needs no download.
        pretrained: A pretrained tag of open_clip (``openai``, downloaded by open_clip) or a checkpoint file.
            Default none, which for a plain model name means random weights. ``nano``, local folders and hub
            models include weights; a checkpoint file replaces them.
        cache_dir: Folder for open_clip's downloads; default its own choice.
        image_size: Side of the square input in pixels; default the model's own. Positions are resampled to it.
        weights: Which set to read from a checkpoint file that holds several, as for
            ``clmerge.checkpoints.open_checkpoint``; default the averaged one if there is one.

    Raises:
        ValueError: For an unknown name or tag (the message lists the nearest ones), for a checkpoint of another
            model, for a local folder without weights, or for weights trained with QuickGELU (such as OpenAI's)
            under a model name with another activation.
        FileNotFoundError: For a local folder that does not exist or has no ``open_clip_config.json``.

    Example:
        >>> backbone = OpenClip("nano")
        >>> backbone(torch.zeros(2, 3, 28, 28)).shape[0]
        2
    """

    default_trainable: ClassVar[tuple[str, ...]] = ("visual.*",)
    encoder: ClassVar[str] = "visual"

    def __init__(
        self,
        name: str = "nano",
        *,
        pretrained: str | None = None,
        cache_dir: str | None = None,
        image_size: int | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        import open_clip

        self.name = name
        source = f"local-dir:{NANO}" if name == "nano" else name
        folder = Path(source.removeprefix("local-dir:")) if source.startswith("local-dir:") else None
        file = pretrained if pretrained is not None and Path(pretrained).is_file() else None
        if image_size is not None and pretrained is None and folder is not None:
            file = _weights_in(folder)  # read here in float32: open_clip cannot resample positions in half precision
        if not source.startswith(_SOURCES):
            _check_name(name, ["nano", *open_clip.list_models()], "open_clip")
        if pretrained is not None and file is None:
            _check_tag(name, pretrained)
        _check_weights(weights, file)
        with _naming(name, file or source), _loading_later():
            self.model, self.train_transform, self.eval_transform = open_clip.create_model_and_transforms(
                source,
                pretrained=pretrained if file is None else None,
                pretrained_text=file is None,
                cache_dir=cache_dir,
                force_image_size=image_size,
                require_pretrained=source.startswith(_SOURCES) and file is None,
                load_weights=image_size is None or file is None,
            )
            if file is not None:
                self._load(file, weights)
        if pretrained is None and not source.startswith(_SOURCES):
            self.starts_random = "set --model.backbone.pretrained to a tag of open_clip or a checkpoint file"
        _refuse_remote_code(source)
        vocabulary = None if folder is None else folder / "bpe_simple_vocab.txt.gz"
        brings_vocabulary = vocabulary is not None and vocabulary.is_file()
        self._tokenize: Callable[[Sequence[str]], Tensor] = open_clip.get_tokenizer(
            source, cache_dir=cache_dir, **({"bpe_path": str(vocabulary)} if brings_vocabulary else {})
        )
        self.feature_dim = self._num_features()
        if file is None:
            tagged = {} if pretrained is None else open_clip.get_pretrained_cfg(name, pretrained)
            repository = (tagged.get("hf_hub") or "").rpartition("/")[0]  # a file follows, or nothing
            self._note_hub(source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else repository, cache_dir)

    def _load(self, file: str, weights: str | None) -> None:
        import open_clip

        if Path(file).suffix in _NUMPY:
            open_clip.load_checkpoint(self.model, file)
            return
        state, self.read = _weights_of(file, self.model, weights)
        with TemporaryDirectory() as folder:
            # open_clip converts names and resamples positions only of what it reads from a file, in float32 at least.
            state = {k: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for k, v in state.items()}
            torch.save(state, Path(folder, "weights.pt"))
            open_clip.load_checkpoint(self.model, str(Path(folder, "weights.pt")))

    def _num_features(self) -> int:
        visual: Any = self.model.visual
        if (known := getattr(visual, "output_dim", None)) is not None:
            return int(known)
        # open_clip's wrapper around timm models does not say.
        size = visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        with torch.no_grad(), eval_mode(self.model):
            return int(self(torch.zeros(1, 3, height, width)).shape[1])

    def forward(self, images: Tensor) -> Tensor:
        """Encode images of shape ``(B, 3, H, W)`` into features of shape ``(B, D)``, not normalised."""
        features: Tensor = self.model.encode_image(images)  # type: ignore[operator]
        return features

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode ``N`` prompts into features of shape ``(N, D)``, not normalised."""
        device = next(self.model.parameters()).device
        features: Tensor = self.model.encode_text(self._tokenize(list(prompts)).to(device))  # type: ignore[operator]
        return features

    def logit_scale(self) -> float:
        """Return the factor from cosine similarity to logits that the model was pretrained with."""
        return float(self.model.logit_scale.detach().exp())  # type: ignore[operator]


class Timm(Backbone):
    """A timm model without its classifier.

    Args:
        name: A timm model name (``vit_base_patch16_224.augreg_in21k``), ``local-dir:FOLDER`` or
            ``hf-hub:ORG/MODEL``.
        pretrained: Whether to load (and, if needed, download) timm's weights for ``name``.
        checkpoint: A checkpoint file to load instead; its classifier is ignored, positions are resampled to
            ``image_size`` as in timm.
        image_size: Side of the square input in pixels; default the model's own. No effect on the weights of a model
            that takes images of any size, such as a ResNet.
        weights: Which set to read from a ``checkpoint`` that holds several, as for
            ``clmerge.checkpoints.open_checkpoint``; default the averaged one if there is one.

    Raises:
        ValueError: For an unknown name or tag (the message lists the nearest names), for ``pretrained`` together with
            ``checkpoint``, or for a checkpoint that is missing or of another model.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        checkpoint: str | None = None,
        image_size: int | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        import timm
        from timm.data import create_transform, resolve_data_config

        if pretrained and checkpoint is not None:
            raise ValueError(
                f"expected pretrained=True or a checkpoint, got both (checkpoint={checkpoint!r}); drop one"
            )
        _check_weights(weights, checkpoint)
        takes_size = True
        if not name.startswith(_SOURCES):
            _check_name(name.split(".")[0], timm.list_models(), "timm")
            with _naming(name, "timm"):
                takes_size = bool(timm.get_pretrained_cfg(name).fixed_input_size)
        size: dict[str, Any] = {"img_size": image_size} if image_size is not None and takes_size else {}
        try:
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
        except TypeError as error:  # what a folder or a hub holds is known when it is built
            if "img_size" not in str(error):
                raise
            size = {}
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        if not pretrained and checkpoint is None:
            self.starts_random = "set --model.backbone.pretrained=true or --model.backbone.checkpoint=FILE"
        if checkpoint is not None:
            self._load(checkpoint, name, weights, size)
        config = resolve_data_config(
            {} if image_size is None else {"input_size": (3, image_size, image_size)}, model=self.model
        )
        self.eval_transform = create_transform(**config, is_training=False)
        # As mild as CLIP's own: no flips, no colour changes. Users choose stronger augmentation themselves.
        self.train_transform = create_transform(
            **config, is_training=True, scale=(0.9, 1.0), hflip=0.0, color_jitter=None, auto_augment=None
        )
        self.name, self.image_size, self.size = name, image_size, size
        if pretrained:
            known: Any = self.model.pretrained_cfg.get("hf_hub_id")  # type: ignore[operator, union-attr]
            self._note_hub(name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else known or "")
        # Some models have another projection between trunk and classifier.
        self.feature_dim = int(getattr(self.model, "head_hidden_size", self.model.num_features))  # type: ignore[arg-type]

    def _load(self, checkpoint: str, name: str, weights: str | None, size: Mapping[str, Any]) -> None:
        import timm

        if not Path(checkpoint).is_file():
            raise ValueError(f"expected a checkpoint file, got {checkpoint!r}")
        with _naming(name, checkpoint):
            state, self.read = _weights_of(checkpoint, self.model, weights)
        classifier: Any = self.model.pretrained_cfg.get("classifier") or ()  # type: ignore[operator, union-attr]
        prefixes = tuple(f"{c}." for c in ((classifier,) if isinstance(classifier, str) else classifier))
        own = self.model.state_dict()
        state = {k: v for k, v in state.items() if k in own or not k.startswith(prefixes)}
        # As pretrained weights of a model without a classifier timm converts the state, and loads it strictly.
        given = {"source": "", "state_dict": state, "num_classes": 0}
        # The weights of this second model are all replaced: it takes no random numbers from what is built later.
        with _naming(name, checkpoint), torch.random.fork_rng(devices=[]):
            self.model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=given, **size)
        self.model.pretrained_cfg.pop("state_dict")  # type: ignore[operator, union-attr]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images of shape ``(B, 3, H, W)`` into features of shape ``(B, D)``, not normalised."""
        features: Tensor = self.model(images)
        return features


@contextmanager
def _loading_later() -> Iterator[None]:
    """Keep back open_clip's notice that a model has no weights yet; ``starts_random`` says so where it stays so."""

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("No pretrained weights loaded")

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)


@contextmanager
def _naming(name: str, origin: str) -> Iterator[None]:
    """Add the model's name and origin to errors of the libraries."""
    try:
        yield
    except (RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"expected the weights of {name!r} in {origin}, got: {reason}") from error


def _weights_of(file: str, model: nn.Module, weights: str | None) -> tuple[dict[str, Tensor], str]:
    """Return a checkpoint file's weights for a model, by the model's names, and a description of them."""
    opened = open_checkpoint(file, weights)
    if opened.is_task_vector:
        raise ValueError(f"expected weights, got the task vector {file}; add it to its base with clmerge merge")
    align_names(opened, model.state_dict(), f"the model {type(model).__name__}")
    if weights is not None and opened.weights != weights:
        raise ValueError(f"expected a checkpoint that holds weights {weights!r}, got {file} ({opened.kind})")
    return dict(opened), describe(opened)


def load_weights(backbone: Backbone, file: str) -> None:
    """Load the weights in a file of any format that clmerge reads into a backbone; nothing in it is executed.

    Args:
        backbone: The backbone; changed in place.
        file: The file; prefixes of its names may differ from the model's.

    Raises:
        ValueError: If the file holds other weights than the model's.
        FileNotFoundError: If there is no such file.
    """
    with _naming(type(backbone).__name__, file):
        state, _ = _weights_of(file, backbone.model, None)
        backbone.model.load_state_dict(state)


def _weights_in(folder: Path) -> str | None:
    """Return the file with the weights of a local folder of open_clip; None if only open_clip can find them."""
    file = folder / "open_clip_model.safetensors"
    return str(file) if file.is_file() else None


def _check_weights(weights: str | None, file: str | None) -> None:
    if weights is not None and file is None:
        raise ValueError(f"expected a checkpoint file to read weights={weights!r} of, got none; name one")


def _check_name(name: str, known: list[str], library: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; for a folder write 'local-dir:{name}'" if Path(name).is_dir() else ""
        raise ValueError(f"expected a model of {library}, got {name!r}; nearest: {', '.join(near) or 'none'}{hint}")


def _refuse_remote_code(source: str) -> None:
    """Refuse a model whose configuration loads tokenizer code from elsewhere, which open_clip would run."""
    import open_clip

    config = open_clip.get_model_config(source) or {}
    if config.get("text_cfg", {}).get("tokenizer_kwargs", {}).get("trust_remote_code"):
        raise ValueError(
            f"expected a model without code of its own, got {source!r}, whose configuration sets trust_remote_code for "
            "its tokenizer; nothing was run. Take that entry out if the tokenizer works without it"
        )


def _check_tag(name: str, tag: str) -> None:
    """Refuse a pretrained tag of open_clip that is unknown or was trained with another activation."""
    import open_clip

    if name == "nano" or name.startswith(_SOURCES):
        raise ValueError(f"expected a checkpoint file beside {name!r}, which brings its own weights, got {tag!r}")
    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"expected a pretrained tag of {name} or a checkpoint file, got {tag!r}; tags: {tags}")
    # open_clip only warns, and such a model is less accurate from the start.
    if found.get("quick_gelu") and not open_clip.get_model_config(name).get("quick_gelu"):
        raise ValueError(
            f"expected a model with QuickGELU for pretrained={tag!r}, got {name!r}, which would run these "
            f"weights with another activation; use {name + '-quickgelu'!r}"
        )
