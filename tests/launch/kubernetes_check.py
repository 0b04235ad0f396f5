"""Checks manifests without a cluster: types and required fields, unknown keys, and the pods' own schema.

The operators' models ignore keys they do not know, so what they read is written again and compared with the file.
"""

from collections.abc import Iterator
from typing import Any

import kubernetes_validate
from kubeflow_trainer_api import models
from pydantic import ValidationError

KUBERNETES = "1.37"
KINDS = {
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): models.TrainerV1alpha1TrainJob,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): models.TrainerV1alpha1TrainingRuntime,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): models.JobsetV1alpha2JobSet,
}


def errors(document: dict[str, Any]) -> list[str]:
    """Everything that is wrong with one manifest; empty: nothing."""
    kind = (document.get("apiVersion"), document.get("kind"))
    if kind not in KINDS:
        return [f"unknown kind {kind}"]
    try:
        read = KINDS[kind].from_dict(document)
    except ValidationError as error:
        return [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
    assert read is not None
    found = [f"{path}: unknown key" for path in unknown_keys(document, read.to_dict())]
    for name, job in replicated_jobs(document):
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job["spec"]}
        try:
            kubernetes_validate.validate(whole, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{name}: {'.'.join(map(str, error.path))}: {error.message}")
    return found


def unknown_keys(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """Paths of the keys of `written` that did not survive the round trip."""
    if isinstance(written, dict):
        for key, value in written.items():
            if not isinstance(read, dict) or key not in read:
                yield f"{path}.{key}".lstrip(".")
            else:
                yield from unknown_keys(value, read[key], f"{path}.{key}")
    elif isinstance(written, list):
        for index, value in enumerate(written):
            yield from unknown_keys(value, read[index] if index < len(read) else None, f"{path}[{index}]")


def replicated_jobs(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    spec = document["spec"]
    if document["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    return [(job["name"], job["template"]) for job in spec.get("replicatedJobs", [])]
