"""The Kubernetes manifests against the operators' schemas, and their command line as it stands."""

import copy
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dist.launching import BIN, ROOT, launch
from tests.launch.kubernetes_check import errors, replicated_jobs

FOLDER = ROOT / "launch" / "kubernetes"
NAMES = ("trainjob", "trainingruntime", "jobset")


def manifest(name: str) -> dict[str, Any]:
    document = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(document, dict)
    return document


def container(document: dict[str, Any]) -> dict[str, Any]:
    ((_, job),) = replicated_jobs(document)
    return job["spec"]["template"]["spec"]["containers"][0]


def job_of(document: dict[str, Any]) -> dict[str, Any]:
    return replicated_jobs(document)[0][1]["spec"]


@pytest.mark.parametrize("name", NAMES)
def test_manifest_fits_its_schema(name: str) -> None:
    assert errors(manifest(name)) == []


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        pytest.param("trainjob", lambda d: d["spec"]["trainer"].update(numNode=2), id="misspelt key"),
        pytest.param("trainjob", lambda d: d["spec"]["trainer"].update(numProcPerNode="auto"), id="removed value"),
        pytest.param("trainjob", lambda d: d["spec"].update(podTemplateOverrides=[]), id="removed field"),
        pytest.param("trainjob", lambda d: d["spec"].pop("runtimeRef"), id="required field missing"),
        pytest.param("trainjob", lambda d: d.update(kind="PyTorchJob"), id="unknown kind"),
        pytest.param("trainingruntime", lambda d: d["spec"]["mlPolicy"]["torch"].update(numProcPerNode=8), id="moved field"),
        pytest.param("trainingruntime", lambda d: container(d).update(workDir="/"), id="misspelt container key"),
        pytest.param("trainingruntime", lambda d: container(d)["env"][0].update(value=1), id="number as environment"),
        pytest.param("jobset", lambda d: d["spec"]["network"].update(enableDnsHostnames=True), id="wrong case"),
        pytest.param("jobset", lambda d: d["spec"]["failurePolicy"].update(maxRestarts="ten"), id="wrong type"),
        pytest.param("jobset", lambda d: job_of(d)["template"]["spec"].update(restartPolicy="Sometimes"), id="wrong enum"),
        pytest.param("jobset", lambda d: job_of(d).update(backofLimit=0), id="misspelt job key"),
        pytest.param("jobset", lambda d: container(d).pop("name"), id="container without a name"),
    ],
)  # fmt: skip
def test_checker_catches_planted_mistakes(name: str, plant: Any) -> None:
    document = copy.deepcopy(manifest(name))
    plant(document)
    assert errors(document)


@pytest.mark.parametrize("name", ["trainingruntime", "jobset"])
def test_pods_have_what_restarts_and_saving_need(name: str) -> None:
    document = manifest(name)
    pod = job_of(document)["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in container(document)["env"]}
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun's own time between SIGTERM and SIGKILL
    assert pod["restartPolicy"] == "Never" and job_of(document)["backoffLimit"] == 0


def test_jobset_counts_its_nodes_once() -> None:
    document = manifest("jobset")
    environment = {entry["name"]: entry["value"] for entry in container(document)["env"]}
    job, name = job_of(document), document["metadata"]["name"]
    assert job["parallelism"] == job["completions"] == int(environment["PET_NNODES"])
    assert (
        environment["PET_RDZV_ENDPOINT"] == f"{name}-{document['spec']['replicatedJobs'][0]['name']}-0-0.{name}:29500"
    )
    assert container(document)["resources"]["limits"]["nvidia.com/gpu"] == environment["PET_NPROC_PER_NODE"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainjob", "jobset"])
def test_command_line_of_the_manifest_trains(name: str, sample_data: Path, tmp_path: Path) -> None:
    document = manifest(name)
    of = document["spec"]["trainer"] if name == "trainjob" else container(document)
    environment = {entry["name"]: entry["value"] for entry in of.get("env", [])}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # The manifest's variables, on one node of two ranks; the operator of a TrainJob sets these five itself.
    environment |= {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}
    if name == "trainjob":
        environment |= {"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    else:
        environment |= {"PET_RDZV_ENDPOINT": f"localhost:{port}"}
    small = [
        "--config",
        "tests/dist/small.yaml",
        f"data.path={sample_data}",
        f"run.folder={tmp_path}",
        "run.name=small",
    ]
    program = BIN / of["command"][0]  # the image's PATH
    done = launch([str(program), *of["command"][1:], *of["args"], *small, "train.max_steps=2"], **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks x" in done.stdout
    assert json.loads((tmp_path / "small" / "status.json").read_text())["state"] == "finished"
