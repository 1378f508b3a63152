"""Image encoders by name: open_clip and timm models, from their hubs, from a file or from a local folder."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

Transform = Callable[[Image], Tensor]
NANO = Path(__file__).parent / "nano_clip"


class Backbone(nn.Module, ABC):
    """An image encoder with the transforms that belong to it.

    Attributes:
        model: The wrapped model under its own parameter names; saved weights load strictly into it.
        feature_dim: Number of features ``D`` per image.
        train_transform: PIL image to tensor, for training.
        eval_transform: PIL image to tensor, for validation and test.
        default_trainable: Glob patterns over ``model``'s parameter names that are trained unless told otherwise.
    """

    default_trainable: ClassVar[tuple[str, ...]] = ("*",)
    model: nn.Module
    feature_dim: int
    train_transform: Transform
    eval_transform: Transform

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode images of shape ``(B, 3, H, W)`` into features of shape ``(B, D)``, not normalised."""

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
    """A CLIP model of open_clip; only its image tower is trained unless told otherwise.

    Args:
        name: An open_clip model name (``ViT-B-16-quickgelu``), ``local-dir:FOLDER`` or ``hf-hub:ORG/MODEL``, or
            ``nano``: the small CLIP that is part of clmerge and needs no download.
        pretrained: A pretrained tag of open_clip (``openai``, downloaded by open_clip) or a checkpoint file; default
            none, which for a plain model name means random weights. Local folders and hub models bring their own.
        cache_dir: Where open_clip keeps downloads; default its own choice.

    Raises:
        ValueError: For an unknown name (the nearest ones are given), or for OpenAI's weights under a model name whose
            activation is not the QuickGELU they were trained with.

    Example:
        >>> backbone = OpenClip("nano")
        >>> backbone(torch.zeros(2, 3, 28, 28)).shape[0]
        2
    """

    default_trainable: ClassVar[tuple[str, ...]] = ("visual.*",)

    def __init__(self, name: str = "nano", *, pretrained: str | None = None, cache_dir: str | None = None) -> None:
        super().__init__()
        import open_clip

        folder = NANO if name == "nano" else None
        if name.startswith("local-dir:"):
            folder = Path(name.removeprefix("local-dir:"))
        elif ":" not in name and folder is None and name not in (known := open_clip.list_models()):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise ValueError(f"expected a model of open_clip, got {name!r}; nearest: {', '.join(near) or 'none'}")
        if pretrained == "openai" and "quickgelu" not in name and name.startswith("ViT"):
            raise ValueError(
                f"expected a model with QuickGELU for pretrained='openai', got {name!r}, which would run these weights "
                f"with another activation; use {name + '-quickgelu'!r}"
            )
        source = f"local-dir:{folder}" if folder is not None else name
        self.model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            source, pretrained=pretrained, cache_dir=cache_dir
        )
        self.train_transform, self.eval_transform = train_transform, eval_transform
        vocabulary = None if folder is None else folder / "bpe_simple_vocab.txt.gz"
        brings_vocabulary = vocabulary is not None and vocabulary.is_file()
        self._tokenize: Callable[[Sequence[str]], Tensor] = open_clip.get_tokenizer(
            source, **({"bpe_path": str(vocabulary)} if brings_vocabulary else {})
        )
        self.feature_dim = int(self.model.visual.output_dim)  # type: ignore[union-attr, arg-type]

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
        name: A timm model name (``vit_base_patch16_224.augreg_in21k``), ``local-dir:FOLDER`` or ``hf-hub:ORG/MODEL``.
        pretrained: Whether to load (and, if need be, download) the weights that timm has for ``name``.
        checkpoint: A checkpoint file to load instead.
        image_size: Side of the square input in pixels; default the model's own.

    Raises:
        ValueError: For an unknown name; the nearest ones are given.
    """

    def __init__(
        self, name: str, *, pretrained: bool = False, checkpoint: str | None = None, image_size: int | None = None
    ) -> None:
        super().__init__()
        import timm
        from timm.data import create_transform, resolve_data_config

        if ":" not in name and name.split(".")[0] not in (known := timm.list_models()):
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise ValueError(f"expected a model of timm, got {name!r}; nearest: {', '.join(near) or 'none'}")
        size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        self.model = timm.create_model(
            name, pretrained=pretrained, checkpoint_path=checkpoint or "", num_classes=0, **size
        )
        config = resolve_data_config(
            {} if image_size is None else {"input_size": (3, image_size, image_size)}, model=self.model
        )
        self.eval_transform = create_transform(**config, is_training=False)
        # Like CLIP's: crop and flip nothing but a mild random resized crop; heavier augmentation is the project's choice.
        self.train_transform = create_transform(
            **config, is_training=True, no_aug=False, scale=(0.9, 1.0), hflip=0.0, color_jitter=None, auto_augment=None
        )
        self.feature_dim = int(self.model.num_features)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images of shape ``(B, 3, H, W)`` into features of shape ``(B, D)``, not normalised."""
        features: Tensor = self.model(images)
        return features
