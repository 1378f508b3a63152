"""Fine-tuning in the tangent space of the pretrained weights."""

from collections.abc import Iterable
from typing import Literal

from typing_extensions import override

from clmerge.models.backbone import Backbone
from clmerge.models.tuning.scope import scoped_parameters, train_only
from clmerge.models.tuning.tangent import TangentModule
from clmerge.models.tuning.tuning import Tuning


class Linearized(Tuning):
    """Train the first-order expansion of the image encoder around its pretrained weights (arXiv:2305.12827).

    The features are linearized, as in the paper; the head, which normalises them where it compares by cosine, comes
    after. A step costs 5/3 of an ordinary one in matrix products, an evaluation three times as much. Merged models are
    evaluated in the tangent space, too; the weights ``theta_0 + tau`` that a run leaves behind are those of an ordinary
    model.

    Args:
        scope: What gets a tangent, as for ``Partial``; the rest is constant. Default all that ``Full`` trains.
        last_blocks: Only what of the scope is in the last ``last_blocks`` blocks.
        decay_to: What the optimizer's weight decay pulls the weights to: the ``base``, or ``zero`` as in ``Full``.
        evaluate: What is computed in evaluation: the ``linear`` model, or post hoc the ``nonlinear`` one at
            ``theta_0 + tau``.
        checkpointing: Whether activations inside of each block are computed again in the backward pass.

    Raises:
        ValueError: If the scope matches nothing, or something that is not part of the image encoder.
    """

    def __init__(
        self,
        *,
        scope: str | list[str] | None = None,
        last_blocks: int | None = None,
        decay_to: Literal["base", "zero"] = "base",
        evaluate: Literal["linear", "nonlinear"] = "linear",
        checkpointing: bool = False,
    ) -> None:
        self.scope = scope
        self.last_blocks = last_blocks
        self.decay_to: Literal["base", "zero"] = decay_to
        self.evaluate: Literal["linear", "nonlinear"] = evaluate
        self.checkpointing = checkpointing

    @override
    def apply(self, backbone: Backbone) -> None:
        names = scoped_parameters(backbone, self.scope, self.last_blocks)
        train_only(backbone, names)
        path = encoder_path(backbone, names)
        module = TangentModule(
            backbone.get_submodule(path),
            decay_to=self.decay_to,
            evaluate=self.evaluate,
            checkpointing=self.checkpointing,
        )
        backbone.set_submodule(path, module)


def encoder_path(backbone: Backbone, names: Iterable[str]) -> str:
    """Return the path of a backbone's image encoder.

    Args:
        backbone: The backbone.
        names: Names of parameters of the wrapped model, which must be the encoder's.

    Raises:
        ValueError: If one is not.
    """
    prefix = f"{backbone.encoder}." if backbone.encoder else ""
    if outside := [name for name in names if not name.startswith(prefix)]:
        raise ValueError(
            f"expected a scope within the image encoder {backbone.encoder!r}, whose features are linearized, got "
            f"{outside[0]!r}; narrow it"
        )
    return f"model.{backbone.encoder}".removesuffix(".")
