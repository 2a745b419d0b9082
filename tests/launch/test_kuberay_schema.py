"""The manifest against the fields of KubeRay and Kubernetes that it uses: names, kinds and limits. Needs no cluster or operator.

RayJob, RayService and the specs below them follow KubeRay's API reference for ray.io/v1 (docs/reference/api.md in the KubeRay
repository, commit 0057210). Pods, ConfigMap and metadata follow the Kubernetes API reference, v1.28. Only the fields that we use
are listed, so a misspelt, misplaced or new field fails until someone has looked it up.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from test_rendering import CONFIG, CREDENTIALS, SERVE, rendered

from rec_dist.cli import main

Check = Callable[[Any, str], None]
_NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_QUANTITY = r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?"


def kind(expected: type, *, least: int | None = None) -> Check:
    def check(value: Any, path: str) -> None:
        assert type(value) is expected, f"{path}: {value!r} is no {expected.__name__}"
        assert least is None or value >= least, f"{path}: {value!r} is below {least}"

    return check


def text(pattern: str) -> Check:
    def check(value: Any, path: str) -> None:
        assert isinstance(value, str), f"{path}: {value!r} is no text"
        assert re.fullmatch(pattern, value, re.DOTALL), f"{path}: {value!r} is not {pattern}"

    return check


def mapping(keys: Check, values: Check) -> Check:
    def check(value: Any, path: str) -> None:
        assert isinstance(value, dict), f"{path}: {value!r} is no mapping"
        for key, entry in value.items():
            keys(key, f"{path} (key)")
            values(entry, f"{path}.{key}")

    return check


def array(entries: Check) -> Check:
    def check(value: Any, path: str) -> None:
        assert isinstance(value, list), f"{path}: {value!r} is no list"
        for number, entry in enumerate(value):
            entries(entry, f"{path}[{number}]")

    return check


def fields(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    def check(value: Any, path: str) -> None:
        assert isinstance(value, dict), f"{path}: {value!r} is no object"
        missing, unknown = set(required) - set(value), set(value) - set(required) - set(optional or {})
        assert not missing, f"{path} lacks {sorted(missing)}"
        assert not unknown, f"{path} has {sorted(unknown)}, which is no field we know"
        for key, entry in value.items():
            {**required, **(optional or {})}[key](entry, f"{path}.{key}")

    return check


STRINGS = mapping(text(r".+"), text(r".*"))
METADATA = fields({"name": text(_NAME), "namespace": text(_NAME)}, {"labels": STRINGS})
VARIABLE = text(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_KEY = fields({"secretKeyRef": fields({"name": text(_NAME), "key": text(r"[-._A-Za-z0-9]+")})})
RESOURCES = mapping(text(r"cpu|memory|[a-z0-9.-]+/[a-z0-9.-]+"), text(_QUANTITY))
CONTAINER = fields(
    {
        "name": text(_NAME),
        "image": text(r"\S+"),
        "env": array(fields({"name": VARIABLE}, {"value": text(r".*"), "valueFrom": SECRET_KEY})),
        "resources": fields({"limits": RESOURCES, "requests": RESOURCES}),
        "volumeMounts": array(fields({"name": text(_NAME), "mountPath": text(r"/.*")})),
    },
    {"envFrom": array(fields({"secretRef": fields({"name": text(_NAME)})}))},
)
VOLUME = fields(
    {"name": text(_NAME)},
    {
        "persistentVolumeClaim": fields({"claimName": text(_NAME)}),
        "configMap": fields({"name": text(_NAME)}),
        "emptyDir": fields({"medium": text("Memory"), "sizeLimit": text(_QUANTITY)}),
    },
)
POD = fields(
    {"containers": array(CONTAINER), "volumes": array(VOLUME), "terminationGracePeriodSeconds": kind(int, least=0)},
    {"nodeSelector": STRINGS, "serviceAccountName": text(_NAME)},
)
TEMPLATE = fields({"spec": POD})
HEAD_GROUP = fields({"rayStartParams": STRINGS, "template": TEMPLATE})
WORKER_GROUP = fields(
    {
        "groupName": text(_NAME),
        "replicas": kind(int, least=0),
        "minReplicas": kind(int, least=0),
        "maxReplicas": kind(int, least=0),
        "rayStartParams": STRINGS,
        "template": TEMPLATE,
    }
)
CLUSTER = fields(
    {
        "rayVersion": text(r"\d+\.\d+\.\d+"),
        "authOptions": fields({"mode": text("token")}),  # from KubeRay 1.5.1 and Ray 2.52 on
        "headGroupSpec": HEAD_GROUP,
        "workerGroupSpecs": array(WORKER_GROUP),
    }
)
RAY_JOB = fields(
    {
        "apiVersion": text("ray.io/v1"),
        "kind": text("RayJob"),
        "metadata": METADATA,
        "spec": fields(
            {
                "entrypoint": text(r".+"),
                "submissionMode": text("K8sJobMode|HTTPMode|InteractiveMode"),
                "runtimeEnvYAML": text(r".+"),
                "backoffLimit": kind(int, least=0),
                "suspend": kind(bool),
                "shutdownAfterJobFinishes": kind(bool),
                "ttlSecondsAfterFinished": kind(int, least=0),
                "rayClusterSpec": CLUSTER,
            }
        ),
    }
)
RAY_SERVICE = fields(
    {
        "apiVersion": text("ray.io/v1"),
        "kind": text("RayService"),
        "metadata": METADATA,
        "spec": fields(
            {
                "upgradeStrategy": fields({"type": text("NewCluster|NewClusterWithIncrementalUpgrade|None")}),
                "rayClusterDeletionDelaySeconds": kind(int, least=0),
                "excludeHeadPodFromServeSvc": kind(bool),
                "serveConfigV2": text(r".+"),
                "rayClusterConfig": CLUSTER,
            }
        ),
    }
)
CONFIG_MAP = fields({"apiVersion": text("v1"), "kind": text("ConfigMap"), "metadata": METADATA, "data": STRINGS})

CASES = [
    (),
    ("submit.kuberay.gpus_per_worker=0", "submit.kuberay.labels={}", "submit.env={}"),
    (
        "submit.kuberay.node_selector={gpu: h100}",
        "submit.kuberay.retries=0",
        f"submit.name={'a-long-name-' * 9}",
        "submit.kuberay.job_name=null",
    ),
    ("submit.command=prepare", *CREDENTIALS),
]
SERVED = [
    (),
    ("submit.kuberay.gpus_per_worker=0", "cluster.num_workers=auto", "submit.kuberay.labels={}", "submit.env={}"),
    (
        "submit.kuberay.node_selector={gpu: h100}",
        f"submit.name={'a-long-name-' * 9}",
        "submit.kuberay.job_name=null",
        *CREDENTIALS,
    ),
]


def manifest(*overrides: str) -> tuple[Any, Any]:
    config_map, ray_job = yaml.safe_load_all(rendered("kuberay", *overrides))
    return config_map, ray_job


@pytest.mark.parametrize("overrides", CASES)
def test_the_manifest_has_the_published_fields(overrides: tuple[str, ...]) -> None:
    config_map, ray_job = manifest(*overrides)
    CONFIG_MAP(config_map, "ConfigMap")
    RAY_JOB(ray_job, "RayJob")
    assert len(ray_job["metadata"]["name"]) <= 47, "KubeRay adds to the name, and pods' names end at 63"


def service(*overrides: str) -> Any:
    (ray_service,) = yaml.safe_load_all(rendered("kuberay", *SERVE, *overrides))
    return ray_service


@pytest.mark.parametrize("overrides", SERVED)
def test_the_service_has_the_published_fields(overrides: tuple[str, ...]) -> None:
    ray_service = service(*overrides)
    RAY_SERVICE(ray_service, "RayService")
    assert len(ray_service["metadata"]["name"]) <= 47
    cluster = ray_service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = [mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]]
        assert sorted(mounts) == sorted(volume["name"] for volume in pod["volumes"])
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("overrides", CASES)
def test_what_is_mounted_is_declared_and_names_agree(overrides: tuple[str, ...]) -> None:
    config_map, ray_job = manifest(*overrides)
    cluster = ray_job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:
        mounts = [mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]]
        assert sorted(mounts) == sorted(volume["name"] for volume in pod["volumes"])
    head = {volume["name"]: volume for volume in pods[0]["volumes"]}
    assert head["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    mounted = {mount["name"]: mount["mountPath"] for mount in pods[0]["containers"][0]["volumeMounts"]}
    assert ray_job["spec"]["entrypoint"].split()[-1] == f"{mounted['config']}/{next(iter(config_map['data']))}"
    assert yaml.safe_load(config_map["data"]["config.yaml"])["train"]["run_dir"].startswith(mounted["storage"])


def test_the_operator_is_asked_for_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    """Without one, every pod that reaches the head could run code there."""
    cluster = manifest()[1]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert main(["submit", str(CONFIG), "--to", "kuberay", "--dry-run", "submit.kuberay.ray_version=2.51.1"]) == 2
    assert "submit.kuberay.ray_version (2.51.1) is older than 2.52" in capsys.readouterr().err


def misspell(ray_job: Any) -> None:
    ray_job["spec"]["backofLimit"] = ray_job["spec"].pop("backoffLimit")


def number_as_start_parameter(ray_job: Any) -> None:
    ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def pod_in_the_group(ray_job: Any) -> None:
    group = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["spec"] = group.pop("template")["spec"]


def service_without_a_cluster(ray_service: Any) -> None:
    ray_service["spec"]["rayClusterSpec"] = ray_service["spec"].pop("rayClusterConfig")


def configuration_as_an_object(ray_service: Any) -> None:
    ray_service["spec"]["serveConfigV2"] = yaml.safe_load(ray_service["spec"]["serveConfigV2"])


@pytest.mark.parametrize("damage", [service_without_a_cluster, configuration_as_an_object])
def test_the_check_finds_a_fault_of_a_service(damage: Callable[[Any], None]) -> None:
    ray_service = service()
    damage(ray_service)
    with pytest.raises(AssertionError, match="RayService"):
        RAY_SERVICE(ray_service, "RayService")


@pytest.mark.parametrize("damage", [misspell, number_as_start_parameter, pod_in_the_group])
def test_the_check_finds_a_fault(damage: Callable[[Any], None]) -> None:
    ray_job = copy.deepcopy(manifest()[1])
    damage(ray_job)
    with pytest.raises(AssertionError, match="RayJob"):
        RAY_JOB(ray_job, "RayJob")
