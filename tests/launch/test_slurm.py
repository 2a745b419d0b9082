"""`rec-dist submit --to slurm` against a real SLURM whose two nodes have their own addresses. One to three minutes a job.

The nodes are network namespaces of this machine (slurm_cluster.py). A service that binds the wrong address, or can only be
found on this host, fails here as it would on a cluster. They share the machine's disk, as nodes share storage, and here /tmp
too, so folders must not clash.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from namespaces import Network, available
from slurm_cluster import PROGRAMS, Slurm, wait_for
from slurm_runs import Run
from strangers import is_let_in

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(None in map(shutil.which, PROGRAMS), reason="needs SLURM: make test-launch"),
    pytest.mark.skipif(not available(), reason="needs root and network namespaces (iproute2)"),
]

_STEPS = (
    "train.max_steps=600",
    "train.epochs=2000",
    "checkpoint.every_steps=300",
    "train.global_batch_size=4",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder, network = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp")), Network(2)
    cluster = Slurm(folder, network)
    try:
        network.open()
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        network.close()
        shutil.rmtree(folder)


@pytest.fixture
def make_run(tmp_path: Path, slurm: Slurm, tiny_config: Callable[..., dict[str, Any]]) -> Callable[[str], Run]:
    return lambda name: Run(tmp_path / name, slurm, tiny_config)


@pytest.fixture
def run(make_run: Callable[[str], Run]) -> Run:
    return make_run("one")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, slurm: Slurm, tiny_config: Callable[..., dict[str, Any]]) -> Run:
    """An undisturbed run of _STEPS."""
    run = Run(tmp_path_factory.mktemp("whole"), slurm, tiny_config)
    _, number, err = run.submit(*_STEPS)
    assert slurm.wait_for_end(number)["JobState"] == "COMPLETED", (err, run.output())
    return run


def test_a_run_over_two_nodes_to_its_end(run: Run, slurm: Slurm) -> None:
    dead = Path("/tmp/rd999999.0")  # of a job that was killed before it could clean up
    dead.mkdir()
    (dead / "lock").touch()
    code, number, err = run.submit()
    assert code == 0, err
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.output()
    assert [row["step"] for row in run.rows("step")] == [1, 2, 3, 4]
    assert "starting 2 workers with 1 CPU each" in run.output(), "one worker a node: of a node the job has one CPU"
    logs = run.folder / "run-slurm" / number / "attempt-0"
    assert (logs / "ray-0" / "raylet.out").is_file()
    assert (logs / "ray-1" / "raylet.out").is_file()
    assert run.addresses(number) == set(slurm.addresses.values()), "two nodes, each at its own"
    wait_for(lambda: run.nothing_is_left(number), "Ray is gone")
    assert not dead.exists()
    code, number, err = run.submit()
    assert (code, number) == (0, "")
    assert "nothing to do" in err


def test_before_its_limit_a_run_saves_and_is_queued_again_and_ends_as_if_nothing_had_been(
    run: Run, whole: Run, slurm: Slurm
) -> None:
    _, number, _ = run.submit(*_STEPS)
    wait_for(lambda: len(run.rows("step")) > 5, "a few steps")
    slurm.ask("scancel", "--batch", "--signal=USR1", number)  # what SLURM sends by --signal=B:USR1@SECONDS before the limit
    wait_for(lambda: slurm.job(number).get("Restarts") == "1", "the job is queued again")
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.output()
    stopped_at = run.rows("resume")[0]["step"]
    assert 5 < stopped_at < 600
    assert stopped_at % 300, "saved on request, not by the way"
    assert [row["step"] for row in run.rows("step")] == list(range(1, 601))
    assert run.differs_from(whole) == []


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_is_set_down_and_the_run_goes_on_from_its_newest_checkpoint_when_it_is_back(
    run: Run, whole: Run, slurm: Slurm, node: str
) -> None:
    """n1 has the batch script, Ray's head and the driver, n2 a worker. SLURM queues the job again by itself."""
    _, number, _ = run.submit(*_STEPS, "checkpoint.every_steps=100")
    wait_for(lambda: run.rows("checkpoint"), "a checkpoint")
    try:
        slurm.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        wait_for(lambda: slurm.job(number)["JobState"] == "PENDING", "the job is queued again")
        wait_for(lambda: run.nothing_is_left(number), "Ray is gone, from the node that is down, too")
        assert not (run.path / "finished.json").exists()
    finally:
        slurm.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
    # Not moved forward: SLURM does not wait for a node that is down. If the job starts too soon, the node's slurmd
    # still counts it as running, rejects it ("Duplicate jobid") and is drained.
    job = slurm.wait_for_end(number, at_once=False)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), run.output()
    assert [row["step"] >= 100 for row in run.rows("resume")] == [True]
    assert [row["step"] for row in run.rows("step")] == list(range(1, 601))
    assert run.differs_from(whole) == []


def test_two_jobs_over_the_same_nodes_at_once(make_run: Callable[[str], Run], whole: Run, slurm: Slurm) -> None:
    """The first run equals `whole`; the second differs by its seed."""
    dead = Path("/tmp/rd999998.0.0")  # both will want to remove it
    dead.mkdir()
    (dead / "lock").touch()
    runs = [make_run("one"), make_run("two")]
    numbers = [run.submit(*_STEPS, f"train.seed={seed}")[1] for seed, run in enumerate(runs)]
    wait_for(lambda: all(run.rows("step") for run in runs), "steps of both")
    jobs = [slurm.job(number) for number in numbers]
    assert [(job["JobState"], job["NodeList"]) for job in jobs] == [("RUNNING", "n[1-2]")] * 2, "at the same time"
    raylets = [run.raylets(number) for run, number in zip(runs, numbers, strict=True)]
    assert list(map(len, raylets)) == [2, 2]
    tokens = [{raylet.environ()["RAY_AUTH_TOKEN"] for raylet in of_job} for of_job in raylets]
    assert list(map(len, tokens)) == [1, 1]
    assert tokens[0] != tokens[1], "each job has a token of its own"
    head, _ = (runs[0].folder / "run-slurm" / numbers[0] / "attempt-0" / "head").read_text(encoding="utf-8").split()
    assert [is_let_in(head, token) for token in (None, *tokens[1], *tokens[0])] == [False, False, True], "nobody else gets in"
    for run, number in zip(runs, numbers, strict=True):
        job = slurm.wait_for_end(number)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), run.output()
        assert [row["step"] for row in run.rows("step")] == list(range(1, 601))
        assert run.rows("resume") == []
        assert run.addresses(number) == set(slurm.addresses.values())
    wait_for(lambda: all(run.nothing_is_left(number) for run, number in zip(runs, numbers, strict=True)), "Ray is gone")
    assert not dead.exists()
    assert runs[0].differs_from(whole) == []
    assert runs[1].differs_from(whole)


def test_scancel_ends_everything_and_the_run_goes_on_when_submitted_again(run: Run, slurm: Slurm) -> None:
    steps = [step.replace("=300", "=5").replace("=600", "=200") for step in _STEPS]
    _, number, _ = run.submit(*steps)
    wait_for(lambda: run.rows("checkpoint"), "a checkpoint")
    slurm.ask("scancel", number)
    assert slurm.wait_for_end(number)["JobState"] == "CANCELLED"
    wait_for(lambda: run.nothing_is_left(number), "Ray is gone")
    _, number, err = run.submit(*steps)
    assert slurm.wait_for_end(number)["JobState"] == "COMPLETED", (err, run.output())
    assert run.rows("resume")
    assert [row["step"] for row in run.rows("step")] == list(range(1, 201))


def test_stopped_for_good_it_ends_with_75_and_is_not_queued_again(run: Run, slurm: Slurm) -> None:
    _, number, _ = run.submit(*_STEPS)
    wait_for(lambda: run.rows("step"), "a step")
    slurm.ask("scancel", "--batch", "--signal=TERM", number)
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), run.output()
    assert run.rows("checkpoint")


def test_a_bad_configuration_never_reaches_the_queue(run: Run, slurm: Slurm) -> None:
    before = slurm.ask("squeue", "--noheader", "--states=all")
    code, number, err = run.submit("train.max_tokens_per_micro_batch=30")
    assert (code, number) == (2, "")
    assert err.startswith("error: train.max_tokens_per_micro_batch (30)")
    assert slurm.ask("squeue", "--noheader", "--states=all") == before
    assert not run.path.exists()
    code, _, err = run.submit("submit.slurm.partition=nowhere")
    assert code == 2
    assert err.startswith("error: sbatch refused the job")


def test_an_interface_that_is_not_there_fails_at_once_and_is_named(run: Run, slurm: Slurm) -> None:
    _, number, _ = run.submit("submit.slurm.interface=ib9")
    job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")
    assert "submit.slurm.interface (ib9)" in run.output()


def test_a_node_without_a_default_route_ends_the_job_at_once_and_is_named(run: Run, slurm: Slurm) -> None:
    """The other node is healthy and does not wait for it."""
    with slurm.network.without_default_route(1):
        _, number, _ = run.submit()
        job = slurm.wait_for_end(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")
    assert "no default route" in run.output()
    assert "set submit.slurm.interface" in run.output()
    wait_for(lambda: run.nothing_is_left(number), "Ray is gone")


def test_a_loop_over_overrides_is_a_sweep(run: Run, slurm: Slurm) -> None:
    """The loop of docs/clusters.md: two jobs, one node each, at the same time, and an interface that exists."""
    one_node = ("submit.slurm.nodes=1", "submit.slurm.interface=eth0", "cluster.num_workers=1")
    places = {seed: run.folder / f"run-{seed}" for seed in (1, 2)}
    numbers = {seed: run.submit(*one_node, f"train.seed={seed}", f"train.run_dir={place}")[1] for seed, place in places.items()}
    for seed, place in places.items():
        assert slurm.wait_for_end(numbers[seed])["JobState"] == "COMPLETED", sorted(
            place.with_name(f"run-{seed}-slurm").glob("*")
        )
        assert yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))["train"]["seed"] == seed
        assert (place / "finished.json").is_file()


def test_a_node_that_is_lost_does_not_leave_the_job_hanging(run: Run, slurm: Slurm) -> None:
    """Ray dies on both nodes: the job ends with 1 and keeps what it had saved."""
    _, number, _ = run.submit(*_STEPS, "cluster.max_restarts=0")
    wait_for(lambda: run.rows("step"), "a step")
    raylets = run.raylets(number)
    assert len(raylets) == 2
    for raylet in raylets:
        raylet.kill()
    job = slurm.wait_for_end(number)
    assert job["JobState"] == "FAILED", run.output()
    wait_for(lambda: run.nothing_is_left(number), "Ray is gone")
