"""What the models of a finished run were made from, as an in-toto statement beside them."""

from pathlib import Path
from typing import Any

import torch

from clmerge.checkpoints.attestation import SUFFIX, described, statement, without_paths
from clmerge.checkpoints.ledger import versions
from clmerge.checkpoints.writer import sha256_of
from clmerge.results.model_facts import ModelFacts
from clmerge.results.run_folder import RunFolder
from clmerge.runs.learner_parts import LearnerParts
from clmerge.weights import write_json_atomic

FILE = f"models{SUFFIX}"
_CHOSEN = ("seed", "mergers", "start_policy", "deploy", "buffers", "trajectory", "branches", "rounds", "evaluation")


def attest_models(run: RunFolder, learner: LearnerParts, facts: ModelFacts) -> None:
    """Write the statement about the files of ``model/`` beside them.

    Task vectors are named by the BLAKE2b of their files, which the manifest holds, the base model by its tensors and,
    where it is of a hub, by repository and commit, the configuration by its SHA-256: what is in it stays out.

    Args:
        run: The run folder, with its models.
        learner: The learner after the last task.
        facts: What the models have in common.
    """
    folder = run.path / "model"
    made = sorted(folder.glob("*.safetensors"))
    if not made:
        return
    chosen = learner.settings()
    document = statement(
        [described(file, folder, sha256_of(file)) for file in made],
        "fit",
        external=without_paths(
            {"run": facts.run, "tasks": [task["name"] for task in facts.tasks], **{key: chosen[key] for key in _CHOSEN}}
        ),
        internal={"threads": torch.get_num_threads()},
        materials=_materials(run, learner, facts),
        versions=versions(),
    )
    write_json_atomic(folder / FILE, document)


def _materials(run: RunFolder, learner: LearnerParts, facts: ModelFacts) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [_base(learner, facts)]
    found += [
        {"name": name, "digest": {"blake2b-128": digest}, "annotations": {"role": "task vector"}}
        for name, digest in run.manifest.files.items()
        if Path(name).parent.name == "bank"
    ]
    if run.config.is_file():
        digest = {"sha256": sha256_of(run.config)}
        found.append({"name": run.config.name, "digest": digest, "annotations": {"role": "configuration"}})
    return found


def _base(learner: LearnerParts, facts: ModelFacts) -> dict[str, Any]:
    found: dict[str, Any] = {"name": facts.base_name, "annotations": {"role": "base model"}}
    if repository := facts.backbone.get("hub"):
        commit = facts.backbone.get("revision")
        found["uri"] = f"pkg:huggingface/{repository}" + (f"@{commit}" if commit else "")
    bank = learner.merge.bank
    if bank is not None and bank.tasks and (tensors := bank.metadata(bank.tasks[0]).get("base")):
        found["digest"] = {"clmerge-tensors-sha256": tensors}
    return found
