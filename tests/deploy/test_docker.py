"""The image can be built as far as that goes without an engine, and compose starts what fits it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.arch.source import ROOT
from tests.deploy import commands, dockerfile
from tests.deploy.dockerfile import Folder, Step

FOLDER = ROOT / "deploy" / "docker"
STEPS = dockerfile.read(FOLDER / "Dockerfile")
IGNORE = FOLDER / "Dockerfile.dockerignore"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
NODES = ("node-0", "node-1")


def copied(steps: list[Step]) -> list[str]:
    """Return what the steps copy from the checkout."""
    return [
        word
        for step in steps
        if step.name == "COPY" and "from" not in step.flags
        for word in step.words[:-1]
    ]


def test_copies_what_is_there_and_nothing_besides() -> None:
    names = copied(STEPS)
    assert {"constraints.txt", "dist_ckpt", "examples"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert all(dockerfile.let_through(IGNORE, name) for name in names)
    for private in (".git", "deploy/docker/credentials.env", "runs/17/manifest.json", "build"):
        assert not dockerfile.let_through(IGNORE, private)
    assert not dockerfile.let_through(IGNORE, "dist_ckpt/__pycache__/a.pyc")


def test_every_package_is_pinned_and_the_base_can_be_chosen() -> None:
    installs = [step.rest for step in STEPS if step.name == "RUN" and "pip install" in step.rest]
    assert len(installs) >= 3
    assert all("--constraint constraints.txt" in install for install in installs)
    bases = [step.words[0] for step in STEPS if step.name == "FROM"]
    assert bases == ["${BASE}", "${BASE}"]
    (default,) = (step.rest for step in STEPS if step.rest.startswith("BASE="))
    assert "slim" in default


def test_the_image_runs_as_a_user_without_rights() -> None:
    last = dockerfile.stages(STEPS)[-1]
    (user,) = (step.rest for step in last if step.name == "USER")
    assert user == "10001:10001"
    (made,) = (step.words for step in last if "useradd" in step.rest)
    assert made[made.index("--uid") + 1] == user.partition(":")[0]
    behind = last[[step.name for step in last].index("USER") :]
    assert {step.name for step in behind} == {"USER", "ENTRYPOINT", "CMD"}


@pytest.mark.soak
def test_the_steps_install_the_command_line(tmp_path: Path) -> None:
    build, _ = dockerfile.stages(STEPS)
    # This host's own index has wheels of torch, of whatever kind.
    folder = Folder(tmp_path, ROOT, {"TORCH_INDEX": ""})
    for step in build:
        folder.do(step)
    assert "Look after the checkpoints" in folder.output(["dist-ckpt", "--help"])
    where = folder.output(["python", "-c", "import dist_ckpt; print(dist_ckpt.__file__)"])
    assert where.startswith(str(tmp_path / "opt" / "dist-ckpt"))


def test_compose_is_as_its_specification_says() -> None:
    vendored = resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads((vendored / "compose-spec.json").read_text())
    validator = Draft202012Validator(schema)
    assert [each.message for each in validator.iter_errors(COMPOSE)] == []
    assert not validator.is_valid({**COMPOSE, "services": {"s3": {"imagee": "x"}}})


def test_compose_builds_with_that_dockerfile() -> None:
    build = SERVICES["node-0"]["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == FOLDER / "Dockerfile"
    assert SERVICES["s3"]["image"].partition(":")[2] not in ("", "latest")


def test_secrets_come_from_a_file_that_git_ignores() -> None:
    assert {service["env_file"] for service in SERVICES.values()} == {"credentials.env"}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/deploy/docker/credentials.env" in ignored
    example = (FOLDER / "credentials.env.example").read_text().splitlines()
    names = {line.partition("=")[0] for line in example if not line.startswith("#")}
    assert names == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert "AWS_SECRET" not in (FOLDER / "compose.yaml").read_text()


def test_two_nodes_meet_and_come_back() -> None:
    for name in NODES:
        node = SERVICES[name]
        options, training = commands.torchrun([*node["entrypoint"][1:], *node["command"]])
        assert options.nnodes == f"{len(NODES)}"
        host, _, port = options.rdzv_endpoint.partition(":")
        # The name by which torchrun knows that it is the host, and by which the others find it.
        assert (host, port.isdigit(), host == SERVICES[host]["hostname"]) == (NODES[0], True, True)
        assert training.checkpoint.checkpoint_dir == node["environment"]["DIST_CKPT_URL"]
        assert training.checkpoint.auto_resume
        assert node["restart"].startswith("on-failure")
        assert node["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        for_workers = int(node["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert for_workers + 20 <= int(node["stop_grace_period"].removesuffix("s"))
    assert {SERVICES[name]["hostname"] for name in NODES} == set(NODES)


def test_the_bucket_is_the_one_that_is_made() -> None:
    (bucket,) = (word for word in SERVICES["s3"]["command"] if word.startswith("-bucket="))
    url = SERVICES["node-0"]["environment"]["DIST_CKPT_URL"]
    assert url.startswith(f"s3://{bucket.removeprefix('-bucket=')}/")


def test_the_command_line_is_there_by_profile() -> None:
    once = {name: service for name, service in SERVICES.items() if "profiles" in service}
    assert set(once) == {"ls", "verify", "sweep"}
    for name, service in once.items():
        assert service["profiles"] == [name]
        assert service["depends_on"] == {"s3": {"condition": "service_healthy"}}
        url = service["environment"]["DIST_CKPT_URL"]
        assert commands.dist_ckpt(["dist-ckpt", *service["command"], url]) == name
