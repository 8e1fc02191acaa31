"""What `kubectl kustomize` makes of a folder, as far as deploy/ uses it; all else is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import yaml

Resource: TypeAlias = dict[str, Any]

_HEADER = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
_KNOWN = {
    *_HEADER,
    "resources",
    "configMapGenerator",
    "generatorOptions",
    "images",
    "patches",
}


class RefusedError(ValueError):
    """A kustomization says something that is not known here."""


def render(folder: Path) -> list[Resource]:
    """Return the resources of `folder`, in the order in which they are named.

    Raises:
        RefusedError: the kustomization has something that is not known, or names what is not there.
    """
    wanted = _one(folder / "kustomization.yaml")
    _check_keys(wanted, _KNOWN, folder)
    if {key: wanted.get(key) for key in _HEADER} != _HEADER:
        raise RefusedError(f"{folder}: no Kustomization of v1beta1")
    found = [each for name in wanted["resources"] for each in _resources(folder / name)]
    _generate(wanted, found, folder)
    for patch in wanted.get("patches", ()):
        _patch(patch, found, folder)
    for image in wanted.get("images", ()):
        _rename(image, found, folder)
    named = [(each["kind"], each["metadata"]["name"]) for each in found]
    if len(set(named)) != len(named):
        raise RefusedError(f"{folder}: two resources of one kind and name among {named}")
    return found


def documents(file: Path) -> list[Resource]:
    """Return the documents of a YAML file."""
    return list(yaml.safe_load_all(file.read_text()))


def containers(value: Any) -> Iterator[Resource]:
    """Yield every container inside of `value`, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("containers", "initContainers") and isinstance(inner, list):
                yield from inner
            yield from containers(inner)
    elif isinstance(value, list):
        for each in value:
            yield from containers(each)


def _one(file: Path) -> Resource:
    (document,) = documents(file)
    return document


def _resources(path: Path) -> list[Resource]:
    return render(path) if path.is_dir() else documents(path)


def _check_keys(value: Resource, known: set[str], folder: Path) -> None:
    if unknown := set(value) - known:
        raise RefusedError(f"{folder}: not known: {', '.join(sorted(unknown))}")


def _generate(wanted: Resource, found: list[Resource], folder: Path) -> None:
    for each in wanted.get("configMapGenerator", ()):
        _check_keys(each, {"name", "behavior", "literals"}, folder)
        if wanted.get("generatorOptions") != {"disableNameSuffixHash": True}:
            raise RefusedError(f"{folder}: names with a hash behind them")
        data = dict(literal.split("=", 1) for literal in each["literals"])
        if each.get("behavior") == "merge":
            (target,) = _matching({"kind": "ConfigMap", "name": each["name"]}, found)
            target["data"].update(data)
        elif "behavior" not in each:
            metadata = {"name": each["name"]}
            config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
            found.append(config)
        else:
            raise RefusedError(f"{folder}: behavior {each['behavior']}")


def _matching(target: Resource, found: list[Resource]) -> list[Resource]:
    name = target.get("name")
    return [
        each
        for each in found
        if each["kind"] == target["kind"] and name in (None, each["metadata"]["name"])
    ]


def _patch(patch: Resource, found: list[Resource], folder: Path) -> None:
    _check_keys(patch, {"target", "patch"}, folder)
    _check_keys(patch["target"], {"kind", "name"}, folder)
    targets = _matching(patch["target"], found)
    if not targets:
        raise RefusedError(f"{folder}: a patch for {patch['target']}, which is not there")
    for target in targets:
        for operation in yaml.safe_load(patch["patch"]):
            _operate(operation, target, folder)


def _operate(operation: Resource, target: Any, folder: Path) -> None:
    """Apply one operation of RFC 6902."""
    *steps, last = operation["path"].removeprefix("/").split("/")
    for step in steps:
        target = target[int(step) if isinstance(target, list) else step]
    if operation["op"] == "add":
        value = copy.deepcopy(operation["value"])
        if isinstance(target, list):
            target.insert(len(target) if last == "-" else int(last), value)
        else:
            target[last] = value
    elif operation["op"] == "remove":
        del target[int(last) if isinstance(target, list) else last]
    else:
        raise RefusedError(f"{folder}: operation {operation['op']}")


def _rename(image: Resource, found: list[Resource], folder: Path) -> None:
    _check_keys(image, {"name", "newName", "newTag"}, folder)
    for container in containers(found):
        if container["image"].partition(":")[0] == image["name"]:
            container["image"] = f"{image['newName']}:{image['newTag']}"
