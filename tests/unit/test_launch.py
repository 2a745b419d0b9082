"""How many workers there are and how much of a node each gets. What Ray would wait for forever is rejected here."""

import pytest

from rec_dist.config.schema import ClusterConfig
from rec_dist.errors import OutOfMemoryError, UserError
from rec_dist.launch.ray_workers import cause
from rec_dist.launch.sizing import Elastic, Size, size_workers

HEAD = {"CPU": 64.0}
GPU_NODE = {"CPU": 32.0, "GPU": 8.0}


def test_without_gpus_one_worker_has_all_cores_of_a_node() -> None:
    assert size_workers(ClusterConfig(), [{"CPU": 1.0}]) == Size(1, False, 1.0)
    assert size_workers(ClusterConfig(), [{"CPU": 16.0}]) == Size(1, False, 16.0)
    assert size_workers(ClusterConfig(), [{"CPU": 16.0}] * 3) == Size(3, False, 16.0)
    assert size_workers(ClusterConfig(), [{}, {"CPU": 16.0}, {"CPU": 16.0}]) == Size(2, False, 16.0)  # a head without CPUs
    assert size_workers(ClusterConfig(), [HEAD, {"CPU": 4.0}]) == Size(2, False, 4.0)
    assert size_workers(ClusterConfig(use_gpu=False), [GPU_NODE]) == Size(1, False, 32.0)


def test_two_workers_of_one_node_are_a_choice() -> None:
    assert size_workers(ClusterConfig(num_workers=2), [{"CPU": 2.0}]) == Size(2, False, 1.0)
    assert size_workers(ClusterConfig(num_workers=2), [{"CPU": 16.0}]) == Size(2, False, 8.0)


@pytest.mark.parametrize("nodes", [[], [{}], [{"CPU": 0.5}]])
def test_a_cluster_without_a_whole_cpu_is_refused(nodes: list[dict[str, float]]) -> None:
    with pytest.raises(UserError, match=r"cluster\.num_workers \(1\).*more CPUs"):
        size_workers(ClusterConfig(), nodes)


def test_a_large_head_does_not_make_a_workers_share_too_large_for_its_node() -> None:
    assert size_workers(ClusterConfig(), [HEAD, GPU_NODE, GPU_NODE]) == Size(16, True, 4.0)


def test_uneven_nodes_get_the_largest_share_that_places_all() -> None:
    assert size_workers(ClusterConfig(num_workers=4), [{"CPU": 3.0}, {"CPU": 5.0}]) == Size(4, False, 1.0)


@pytest.mark.parametrize(
    ("cluster", "key"),
    [
        (ClusterConfig(num_workers=17), "cluster.num_workers"),
        (ClusterConfig(cpus_per_worker=5.0), "cluster.cpus_per_worker"),
        (ClusterConfig(num_workers=200, use_gpu=False), "cluster.num_workers"),
    ],
)
def test_what_cannot_be_placed_is_refused(cluster: ClusterConfig, key: str) -> None:
    with pytest.raises(UserError, match=key):
        size_workers(cluster, [HEAD, GPU_NODE, GPU_NODE])


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match=r"cluster\.use_gpu"):
        size_workers(ClusterConfig(use_gpu=True), [HEAD])


@pytest.mark.parametrize("kind", [UserError, OutOfMemoryError])
def test_what_a_user_can_act_on_is_found_inside_what_ray_raises(kind: type[Exception]) -> None:
    outer = RuntimeError("training failed")
    outer.worker_failures = {1: kind("lower train.max_tokens_per_micro_batch\ntraceback")}  # type: ignore[attr-defined]
    found = cause(outer)
    assert type(found) is kind and str(found) == "lower train.max_tokens_per_micro_batch"
    assert cause(outer.__class__("other")).args == ("other",)


def test_what_is_left_after_a_lost_node() -> None:
    """It shrinks to min_workers and not below, and grows back to the wanted number and never beyond."""
    nodes = [{"CPU": 2.0}] * 3
    elastic = Elastic(ClusterConfig(num_workers=6, min_workers=3, cpus_per_worker=1.0))
    assert elastic.first(nodes) == Size(6, False, 1.0)
    assert elastic.largest(nodes[:2]) == Size(4, False, 1.0)
    with pytest.raises(UserError, match=r"cluster\.num_workers \(6\)"):
        elastic.largest(nodes[:1])
    assert elastic.largest([{"CPU": 9.0}]) == Size(6, False, 1.0)


def test_automatic_is_what_was_there_at_first() -> None:
    elastic = Elastic(ClusterConfig(min_workers=1))
    assert elastic.first([GPU_NODE, GPU_NODE]).num_workers == 16
    assert elastic.largest([GPU_NODE]).num_workers == 8
    with pytest.raises(UserError, match="GPU"):  # a run does not move from GPUs to CPUs
        elastic.largest([HEAD])
    rigid = Elastic(ClusterConfig())
    assert rigid.first([GPU_NODE, GPU_NODE]).num_workers == 16
    with pytest.raises(UserError, match=r"cluster\.num_workers \(16\)"):
        rigid.largest([GPU_NODE])
