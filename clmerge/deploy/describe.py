"""Describe a merger's model in the results of a run: how it answers, its rule, the images that it looks at."""

from typing import Any, TypedDict

from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.routing.routing import Routing
from clmerge.merging import Merger
from clmerge.results.contract import DATA_FREE, Kind
from clmerge.streams.adaptation import AdaptationData

_WITHOUT_IMAGES = frozenset({"adam", "weights", "samples", "steps"})  # statistics that need no image


class Description(TypedDict):
    """The arguments of ``Results.describe``."""

    kind: Kind
    rule: dict[str, Any]
    data: str


def describe_merger(
    merger: Merger,
    *,
    vectors: str = DATA_FREE,
    adaptation: AdaptationData | None = None,
    search: int | None = None,
    calibration: Calibration | None = None,
    routing: Routing | None = None,
) -> Description:
    """Return kind, rule and adaptation data of a merger's model.

    Args:
        merger: The merger with its settings.
        vectors: Images that the task vectors were made with, beside the training of their tasks.
        adaptation: The images that mergers learn on.
        search: Position among the run's searches of the one that chose settings on validation images, if one did.
        calibration: What changes the merged model afterwards, if something does.
        routing: What routes images through experts around the merged model, if something does.

    Returns:
        The arguments of ``Results.describe``. ``data`` is ``none``, or joins by ``+``: ``vectors``, ``current``
        (training images of each task at its end, for statistics), ``val`` (validation images, for scores and searches),
        the adaptation data that it learns on, and those of the calibration or routing.

    Example:
        >>> from clmerge.merging import Fisher, TIES
        >>> describe_merger(TIES())["data"], describe_merger(Fisher(), search=0)["data"]
        ('none', 'current+val')
    """
    statistics = merger.requires - _WITHOUT_IMAGES
    data = [one for one in vectors.split("+") if one != DATA_FREE]
    data += ["current"] * bool(statistics) + ["val"] * (merger.requires_score or search is not None)
    if adaptation is not None and merger.requires_gradient:
        data.append(adaptation.told(labels=merger.reads_labels))
    looks = "" if calibration is None else calibration.data
    looks = looks if routing is None else routing.told(adaptation)
    if looks not in ("", DATA_FREE, *data):
        data.append(looks)
    routed = {"class_path": type(routing).__name__, "init_args": routing.settings()} if routing is not None else None
    kind: Kind = "per_task" if merger.task_views else "merged"
    return {
        "kind": "routed" if routing is not None else "calibrated" if calibration is not None else kind,
        "rule": {
            "merger": type(merger).__name__,
            "init_args": merger.settings(),
            "requires": sorted(
                {
                    *merger.requires,
                    *["score"] * merger.requires_score,
                    *["gradient"] * merger.requires_gradient,
                }
            ),
            "order_free": merger.order_free,
            "exact_online": merger.exact_online,
            "search": search,
            **({} if routed is None else {"routing": routed}),
            **({} if calibration is None else {"calibration": calibration.described()}),
        },
        "data": "+".join(data) or DATA_FREE,
    }
