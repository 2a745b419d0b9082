"""The manifests against KubeRay's own CRDs, which you provide because we cannot ship them.

    kubectl get crd rayjobs.ray.io -o yaml > rayjobs.yaml  # or helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of a release
    kubectl get crd rayservices.ray.io -o yaml > rayservices.yaml
    REC_DIST_RAYJOB_CRD=rayjobs.yaml REC_DIST_RAYSERVICE_CRD=rayservices.yaml python -m pytest tests/launch/test_kuberay_crd.py

Only the structural schema is checked. Unknown fields are rejected, as `kubectl apply --validate=strict` does; CEL rules are not
evaluated. test_kuberay_schema.py needs no file.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_kuberay_schema import (
    CASES,
    SERVED,
    configuration_as_an_object,
    manifest,
    misspell,
    number_as_start_parameter,
    pod_in_the_group,
    service,
    service_without_a_cluster,
)

Faults = Callable[[Any], list[str]]


def strict(schema: Any) -> Any:
    """The schema as jsonschema needs it: unknown fields are rejected, and a quantity may be a number or text."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string") is True:
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if made.get("type") == "object" and "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def faults_by(variable: str) -> Faults:
    """Returns a function that lists what a CRD rejects, the file that the variable names."""
    jsonschema = pytest.importorskip("jsonschema")
    path = os.environ.get(variable)
    if path is None:
        pytest.skip(f"{variable} names no file")
    crd = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, in every CRD an object without fields
    checker = jsonschema.Draft7Validator(schema)
    return lambda job: [f"{'/'.join(map(str, fault.path))}: {fault.message}" for fault in checker.iter_errors(job)]


@pytest.fixture(scope="module")
def faults() -> Faults:
    return faults_by("REC_DIST_RAYJOB_CRD")


@pytest.fixture(scope="module")
def service_faults() -> Faults:
    return faults_by("REC_DIST_RAYSERVICE_CRD")


@pytest.mark.parametrize("overrides", CASES)
def test_the_crd_takes_the_manifest(overrides: tuple[str, ...], faults: Faults) -> None:
    assert faults(manifest(*overrides)[1]) == []


@pytest.mark.parametrize("damage", [misspell, number_as_start_parameter, pod_in_the_group])
def test_the_crd_refuses_what_our_own_check_refuses(damage: Callable[[Any], None], faults: Faults) -> None:
    ray_job = copy.deepcopy(manifest()[1])
    damage(ray_job)
    assert faults(ray_job)


@pytest.mark.parametrize("overrides", SERVED)
def test_the_crd_takes_the_service(overrides: tuple[str, ...], service_faults: Faults) -> None:
    assert service_faults(service(*overrides)) == []


@pytest.mark.parametrize("damage", [service_without_a_cluster, configuration_as_an_object])
def test_the_crd_refuses_a_service_that_our_own_check_refuses(damage: Callable[[Any], None], service_faults: Faults) -> None:
    ray_service = service()
    damage(ray_service)
    assert service_faults(ray_service)
