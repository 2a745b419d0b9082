"""The manifest against KubeRay's own CRD, which you provide because we cannot ship it.

    kubectl get crd rayjobs.ray.io -o yaml > rayjobs.yaml  # or helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml of a release
    REC_DIST_RAYJOB_CRD=rayjobs.yaml python -m pytest tests/launch/test_kuberay_crd.py

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
from test_kuberay_schema import CASES, manifest, misspell, number_as_start_parameter, pod_in_the_group

_PATH = os.environ.get("REC_DIST_RAYJOB_CRD")
pytestmark = pytest.mark.skipif(_PATH is None, reason="REC_DIST_RAYJOB_CRD names no file")


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


@pytest.fixture(scope="module")
def faults() -> Callable[[Any], list[str]]:
    """Returns a function that lists what the CRD rejects in a RayJob."""
    jsonschema = pytest.importorskip("jsonschema")
    assert _PATH is not None
    crd = yaml.safe_load(Path(_PATH).read_text(encoding="utf-8"))
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, in every CRD an object without fields
    checker = jsonschema.Draft7Validator(schema)
    return lambda job: [f"{'/'.join(map(str, fault.path))}: {fault.message}" for fault in checker.iter_errors(job)]


@pytest.mark.parametrize("overrides", CASES)
def test_the_crd_takes_the_manifest(overrides: tuple[str, ...], faults: Callable[[Any], list[str]]) -> None:
    assert faults(manifest(*overrides)[1]) == []


@pytest.mark.parametrize("damage", [misspell, number_as_start_parameter, pod_in_the_group])
def test_the_crd_refuses_what_our_own_check_refuses(damage: Callable[[Any], None], faults: Callable[[Any], list[str]]) -> None:
    ray_job = copy.deepcopy(manifest()[1])
    damage(ray_job)
    assert faults(ray_job)
