"""What is applied to a cluster is what Kubernetes and its operators take, and fits together."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.arch.source import ROOT
from tests.deploy import commands, kustomize, schemas
from tests.deploy.kustomize import Resource

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())


def rendered(overlay: str) -> list[Resource]:
    return kustomize.render(FOLDER / "overlays" / overlay)


def pods(value: Any) -> Iterator[Resource]:
    """Yield every pod template inside of `value`."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for each in value:
            yield from pods(each)


def component(pod: Resource) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_is_as_the_schemas_say(overlay: str) -> None:
    for each in rendered(overlay):
        assert schemas.problems(each) == [], each["kind"]


def test_what_the_schemas_do_not_know_is_told() -> None:
    (job,) = (each for each in rendered("jobset") if each["kind"] == "JobSet")
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "much"
    spec["paralellism"] = spec.pop("parallelism")
    places = sorted(problem.partition(":")[0] for problem in schemas.problems(job))
    inside = "$.spec.replicatedJobs[0].template.spec"
    assert places == [inside, f"{inside}.template.spec.containers[0].resources.limits.memory"]


def test_renders_as_kubectl_does() -> None:
    """Of one that has all that any of them has."""
    overlay = "shared-disk"
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl, whose kustomize this one imitates")
    command = [kubectl, "kustomize", str(FOLDER / "overlays" / overlay)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def by_name(resources: list[Resource]) -> dict[tuple[str, str], Resource]:
        return {(each["kind"], each["metadata"]["name"]): each for each in resources}

    assert by_name(rendered(overlay)) == by_name(list(yaml.safe_load_all(said)))


def test_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    wanted = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    for more in ({"namePrefix": "a-"}, {"patches": [{"target": {"kind": "Pod"}, "patch": ""}]}):
        text = yaml.safe_dump({**wanted, "resources": [], **more})
        (tmp_path / "kustomization.yaml").write_text(text)
        with pytest.raises(kustomize.RefusedError):
            kustomize.render(tmp_path)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_named_is_there(overlay: str) -> None:
    found = rendered(overlay)
    there = {(each["kind"], each["metadata"]["name"]) for each in found}
    # The one thing that nobody should find in a repository.
    secrets = {"dist-ckpt-s3"}
    for pod in pods(found):
        spec = pod["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        for volume in spec.get("volumes", ()):
            claim = volume.get("persistentVolumeClaim")
            assert claim is None or ("PersistentVolumeClaim", claim["claimName"]) in there
        for container in spec["containers"]:
            mounted = {each["name"] for each in container.get("volumeMounts", ())}
            assert mounted <= {each["name"] for each in spec.get("volumes", ())}
            for source in container["envFrom"]:
                if "secretRef" in source:
                    assert source["secretRef"]["name"] in secrets
                else:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in there
    assert not any(each["kind"] == "Secret" for each in found)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_pod_is_under_a_network_policy(overlay: str) -> None:
    found = rendered(overlay)
    policies = [each["spec"] for each in found if each["kind"] == "NetworkPolicy"]
    selected = [policy["podSelector"]["matchLabels"] for policy in policies]
    for pod in pods(found):
        labels = pod["metadata"]["labels"]
        assert [each.items() <= labels.items() for each in selected].count(True) == 1
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy.get("ingress", ()):
            assert rule["from"], "nobody but ranks reaches a rank"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_without_rights(overlay: str) -> None:
    for pod in pods(rendered(overlay)):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert not pod["spec"]["automountServiceAccountToken"]
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert container["image"].startswith("registry.example.com/dist-ckpt:")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_training_has_time_for_its_last_save(overlay: str) -> None:
    training = [each for each in pods(rendered(overlay)) if component(each) == "training"]
    (pod,) = training
    (container,) = pod["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    for_workers = int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    (for_save,) = (each for each in container["args"] if "grace-seconds" in each)
    assert int(for_save.partition("=")[2]) + 10 <= for_workers
    # What is left is torchrun's, to end itself.
    assert for_workers + 20 <= pod["spec"]["terminationGracePeriodSeconds"]
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_command_lines_are_understood(overlay: str) -> None:
    found = rendered(overlay)
    (config,) = (each["data"] for each in found if each["kind"] == "ConfigMap")
    used = set()
    for pod in pods(found):
        (container,) = pod["spec"]["containers"]
        words = [*container.get("command", ["dist-ckpt"]), *container["args"]]
        words = [commands.expand(word, config) for word in words]
        if component(pod) == "training":
            assert words[0] == "torchrun"
            options, program = commands.torchrun(words[1:])
            assert options.max_restarts >= 0
            assert program.checkpoint.checkpoint_dir == config["DIST_CKPT_URL"]
            assert program.checkpoint.auto_resume
        else:
            used.add(commands.dist_ckpt(words))
    assert used == {"verify", "sweep", "mirror"}


def test_the_week_of_verify_reads_all() -> None:
    (job,) = kustomize.documents(FOLDER / "base" / "verify.yaml")
    (container,) = next(pods(job))["spec"]["containers"]
    assert job["spec"]["schedule"].endswith(" * * *"), "each night"
    share = container["args"][0].partition("--sample ")[2]
    days = {
        subprocess.check_output(["sh", "-c", f"date() {{ echo {day}; }}; echo {share}"], text=True)
        for day in range(1, 8)
    }
    assert days == {f"{day}/7\n" for day in range(1, 8)}
