"""What a worker of Ray Data raises reaches the driver with its type and message, without Ray's traceback. No Ray is started."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rec_dist.data.artifacts.user_blocks import TravellingUsers, table_of_users
from rec_dist.errors import DiskError, NotFiniteError, UnreachableError, UserError
from rec_dist.launch import embed_on_ray, rank_on_ray
from rec_dist.launch.prepare_on_ray import result_of
from rec_dist.launch.ray_data import raise_fault

FAULTS = [UserError("a"), UnreachableError("b"), NotFiniteError("c"), DiskError("d")]
USERS = table_of_users(TravellingUsers(0, 0, ["u"], [np.asarray([1], dtype=np.int32)], [None]))


@pytest.mark.parametrize("fault", FAULTS)
def test_of_a_block_of_users(fault: Exception) -> None:
    @contextmanager
    def load(device: str) -> Iterator[Any]:
        def rank(block: TravellingUsers) -> Any:
            raise fault

        yield rank

    row = rank_on_ray._Actor(load, "cpu")(USERS)
    with pytest.raises(type(fault), match=f"^{fault}$"):
        raise_fault({name: value[0] for name, value in row.items()})


@pytest.mark.parametrize("fault", FAULTS)
def test_of_a_part_of_the_embeddings(fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(job: Any, device: str) -> Any:
        raise fault

    monkeypatch.setattr(embed_on_ray, "Embedder", refuses)
    job: Any = Path()
    with pytest.raises(type(fault), match=f"^{fault}$"):
        raise_fault(embed_on_ray._Actor(job, "cpu")({"part": 3}))


@pytest.mark.parametrize("fault", FAULTS)
def test_of_a_job_of_prepare(fault: Exception) -> None:
    def fails(job: object) -> None:
        raise fault

    assert result_of(fails, 1) is fault
    assert result_of(str, 1) == "1"


def test_a_full_disk_under_a_job_of_prepare_names_the_machine() -> None:
    def fills(job: Path) -> None:
        with job.open("w") as file:
            file.write("x")

    fault = result_of(fills, Path("/dev/full"))
    assert isinstance(fault, DiskError)
    assert re.match(rf"the machine {socket.gethostname()}: .*No space left on device.* free space there", str(fault))
    with pytest.raises(AssertionError, match="ours"):
        result_of(ours, Path())


def ours(job: Path) -> None:
    raise AssertionError("ours")


def test_a_fault_of_ours_stays_one_for_ray() -> None:
    @contextmanager
    def load(device: str) -> Iterator[Any]:
        raise AssertionError("ours")
        yield

    with pytest.raises(AssertionError, match="ours"):
        rank_on_ray._Actor(load, "cpu")(USERS)
