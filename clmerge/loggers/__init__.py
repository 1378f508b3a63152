"""Log the metrics of a stream to W&B, CSV, TensorBoard, MLflow and other Lightning loggers.

Code specific to W&B is in ``weights_and_biases.py``, which imports ``wandb`` only where a run is used.
"""

from clmerge.loggers.facts import RunFacts, describe_run
from clmerge.loggers.metrics import FIGURES, TASK_KEY, task_metrics
from clmerge.loggers.telling import (
    finish_loggers,
    log_artifacts,
    log_comparison,
    log_facts,
    log_summary,
    log_task,
)
from clmerge.loggers.weights_and_biases import build_wandb_logger, wandb_sync_command

__all__ = [
    "FIGURES",
    "TASK_KEY",
    "RunFacts",
    "build_wandb_logger",
    "describe_run",
    "finish_loggers",
    "log_artifacts",
    "log_comparison",
    "log_facts",
    "log_summary",
    "log_task",
    "task_metrics",
    "wandb_sync_command",
]
