"""What Kubernetes and its operators take, as JSON schemas in which nothing unknown may stand.

Those of Kubernetes itself, of JobSet and of the Trainer are read from what the Trainer publishes
for Python. The others are written down here, as far as deploy/ uses them: NetworkPolicy of
networking.k8s.io/v1, PyTorchJob of the Training Operator 1.9, RayJob of KubeRay 1.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any, TypeAlias

from jsonschema import Draft202012Validator

Schema: TypeAlias = dict[str, Any]

# The names of classes: their module takes seconds to import, which only who asks should wait for.
_MODELS: dict[tuple[str, str], str] = {
    ("v1", "ConfigMap"): "IoK8sApiCoreV1ConfigMap",
    ("v1", "PersistentVolume"): "IoK8sApiCoreV1PersistentVolume",
    ("v1", "PersistentVolumeClaim"): "IoK8sApiCoreV1PersistentVolumeClaim",
    ("v1", "ServiceAccount"): "IoK8sApiCoreV1ServiceAccount",
    ("batch/v1", "CronJob"): "IoK8sApiBatchV1CronJob",
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): "JobsetV1alpha2JobSet",
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): "TrainerV1alpha1TrainJob",
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): "TrainerV1alpha1TrainingRuntime",
}
_TEXT, _NUMBER, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_WRAPPED: dict[str, Schema] = {
    "ApiResourceQuantity": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"},
    "UtilIntstrIntOrString": {"type": ["integer", "string"]},
}


def problems(resource: dict[str, Any]) -> list[str]:
    """Return what is wrong with `resource`, each with its place; nothing if it is as published.

    Raises:
        KeyError: there is no schema for its kind.
    """
    validator = Draft202012Validator(_schema(resource["apiVersion"], resource["kind"]))
    return [f"{each.json_path}: {each.message}" for each in validator.iter_errors(resource)]


@cache
def _schema(version: str, kind: str) -> Schema:
    model = _MODELS.get((version, kind))
    return _closed(model) if model else _WRITTEN[version, kind]()


def _closed(name: str) -> Schema:
    """Return the schema of a published class, with nothing besides and no choice of null."""
    model = getattr(import_module("kubeflow_trainer_api.models"), name)
    schema: Schema = _without_null(model.model_json_schema())
    for name, described in schema["$defs"].items():
        if "actual_instance" in described.get("properties", {}):
            # In Python an object around the value; what the value may be, its name tells.
            schema["$defs"][name] = _WRAPPED[name.rpartition("IoK8sApimachineryPkg")[2]]
    for each in _objects(schema):
        each.setdefault("additionalProperties", False)
    return schema


def _without_null(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_null(each) for each in schema if each != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _without_null(value) for key, value in schema.items()}
    if len(inner.get("anyOf", ())) == 1:
        # The one that is left in place of the choice, so that errors are about that.
        inner.update(inner.pop("anyOf")[0])
    return inner


def _objects(schema: Any) -> Iterator[Schema]:
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for inner in schema.values():
            yield from _objects(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _objects(inner)


def _object(required: Iterable[str] = (), **properties: Schema) -> Schema:
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**closed, "required": [*required]}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _one_of(*values: str) -> Schema:
    return {"enum": [*values]}


def _resource(spec: Schema) -> Schema:
    """Return the schema of a resource, whose pods are described as Kubernetes does."""
    pods = _closed("IoK8sApiCoreV1PodTemplateSpec")
    metadata = _object(["name"], name=_TEXT, labels=_TEXTS, annotations=_TEXTS)
    names = {"apiVersion": _TEXT, "kind": _TEXT, "metadata": metadata, "spec": spec}
    # The references inside of it are to its own definitions, which lie at the top.
    definitions = pods.pop("$defs")
    whole = _object(["apiVersion", "kind", "metadata", "spec"], **names)
    return {**whole, "$defs": {**definitions, "Pods": pods}}


_PODS: Schema = {"$ref": "#/$defs/Pods"}


def _network_policy() -> Schema:
    labels = _object(matchLabels=_TEXTS)
    block = _object(["cidr"], cidr=_TEXT, **{"except": _list(_TEXT)})
    peer = _object(podSelector=labels, namespaceSelector=labels, ipBlock=block)
    # Port numbers, or the names of ports of the pods.
    number = {"anyOf": [{**_NUMBER, "minimum": 1, "maximum": 65535}, _TEXT]}
    port = _object(protocol=_one_of("TCP", "UDP", "SCTP"), port=number, endPort=_NUMBER)
    ingress = _object(ports=_list(port), **{"from": _list(peer)})
    egress = _object(ports=_list(port), to=_list(peer))
    return _resource(
        _object(
            ["podSelector"],
            podSelector=labels,
            policyTypes=_list(_one_of("Ingress", "Egress")),
            ingress=_list(ingress),
            egress=_list(egress),
        )
    )


def _pytorch_job() -> Schema:
    elastic = _object(
        rdzvBackend=_one_of("c10d", "etcd", "etcd-v2"),
        rdzvId=_TEXT,
        rdzvHost=_TEXT,
        rdzvPort=_NUMBER,
        minReplicas=_NUMBER,
        maxReplicas=_NUMBER,
        maxRestarts=_NUMBER,
    )
    policy = _object(
        cleanPodPolicy=_one_of("All", "Running", "None"),
        ttlSecondsAfterFinished=_NUMBER,
        activeDeadlineSeconds=_NUMBER,
        backoffLimit=_NUMBER,
        suspend=_FLAG,
    )
    replicas = _object(
        replicas=_NUMBER,
        restartPolicy=_one_of("Always", "OnFailure", "Never", "ExitCode"),
        template=_PODS,
    )
    return _resource(
        _object(
            ["pytorchReplicaSpecs"],
            nprocPerNode=_TEXT,
            elasticPolicy=elastic,
            runPolicy=policy,
            pytorchReplicaSpecs=_object(Master=replicas, Worker=replicas),
        )
    )


def _ray_job() -> Schema:
    group = {"rayStartParams": _TEXTS, "template": _PODS}
    numbers = ("replicas", "minReplicas", "maxReplicas", "numOfHosts")
    counts = dict.fromkeys(numbers, _NUMBER)
    workers = _object(["groupName", "template"], groupName=_TEXT, **counts, **group)
    cluster = _object(
        ["headGroupSpec"],
        rayVersion=_TEXT,
        enableInTreeAutoscaling=_FLAG,
        headGroupSpec=_object(["template"], **group),
        workerGroupSpecs=_list(workers),
    )
    return _resource(
        _object(
            entrypoint=_TEXT,
            runtimeEnvYAML=_TEXT,
            submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
            shutdownAfterJobFinishes=_FLAG,
            ttlSecondsAfterFinished=_NUMBER,
            activeDeadlineSeconds=_NUMBER,
            backoffLimit=_NUMBER,
            suspend=_FLAG,
            rayClusterSpec=cluster,
        )
    )


_WRITTEN = {
    ("networking.k8s.io/v1", "NetworkPolicy"): _network_policy,
    ("kubeflow.org/v1", "PyTorchJob"): _pytorch_job,
    ("ray.io/v1", "RayJob"): _ray_job,
}
