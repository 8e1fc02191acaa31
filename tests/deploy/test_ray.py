"""The job for Ray is what KubeRay takes, and its pods are given what the driver asks Ray for."""

from __future__ import annotations

import re
import shlex
from typing import Any

from examples import train_gpt
from tests.arch.source import ROOT
from tests.deploy import commands, kustomize, schemas

FOLDER = ROOT / "deploy" / "ray"
(JOB,) = kustomize.documents(FOLDER / "rayjob.yaml")
CLUSTER: dict[str, Any] = JOB["spec"]["rayClusterSpec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]


def variables(group: dict[str, Any]) -> dict[str, str]:
    (container,) = group["template"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


def test_is_as_the_schema_says() -> None:
    assert schemas.problems(JOB) == []


def test_the_entrypoint_is_a_training() -> None:
    shell, option, script = shlex.split(JOB["spec"]["entrypoint"])
    assert (shell, option) == ("sh", "-c")
    words = shlex.split(commands.expand(script, {"DIST_CKPT_URL": "s3://my-bucket/runs/17"}))
    assert words[:3] == ["python", "/app/examples/train_on_ray.py", "/app/examples/train_gpt.py"]
    options = train_gpt.parse_options(words[3:])
    assert options.checkpoint.auto_resume


def test_each_node_of_the_training_has_a_pod() -> None:
    asked = variables(CLUSTER["headGroupSpec"])
    assert asked == variables(WORKERS), "the driver may run on either"
    assert int(asked["NNODES"]) == WORKERS["replicas"] == WORKERS["minReplicas"]
    assert asked["CPUS_PER_NODE"] == WORKERS["rayStartParams"]["num-cpus"]
    known = (FOLDER / "train_on_ray.py").read_text()
    assert set(asked) <= set(re.findall(r'environ\.get\("(\w+)"', known))


def test_the_image_has_the_ray_of_the_cluster() -> None:
    head = (FOLDER / "rayjob.yaml").read_text()
    assert f"EXTRA_PACKAGES=ray[default]=={CLUSTER['rayVersion']}" in head
    for group in (CLUSTER["headGroupSpec"], WORKERS):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].startswith("registry.example.com/dist-ckpt:")
