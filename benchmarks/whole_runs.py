"""Whole training runs of random models of any size, for benchmarks of memory and time: inputs, workers, prediction.

The run is that of `rec-dist train` from the claim of its directory on. Only Ray is left out, so that nothing but the workers
is on the machine: they are plain processes in one gloo group. No process ever holds a whole model: weights are written tensor
by tensor and, under ZeRO stage 3, read into shards.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.loader import small_tokenizer, write_synthetic
from benchmarks.peer_methods import Shape, llama_config
from rec_dist.commands.prepare import prepare
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.config.yaml_text import to_yaml
from rec_dist.methods.registry import find_initial_weights
from rec_dist.plan.report import make_plan
from rec_dist.runtime.quiet import quieten
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.training.memory import in_use_bytes

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = "local-cpu"
_SHARD_BYTES = 1 << 30
# glibc settings for measuring memory: a large block has pages of its own and returns them when it is freed. Workers of a CPU run
# normally keep freed memory (runtime/allocator.py), which is faster and leaves holes.
_EXACT = {
    "MALLOC_MMAP_MAX_": "60000",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


SHAPES = {
    "25M": Shape(512, 8, 8, 4, 1376, 8192),
    "135M": Shape(),
    "300M": Shape(1024, 24, 16, 8, 2816, 8192),
    "3B": Shape(3072, 30, 24, 8, 8192, 8192),
}


def write_model(folder: Path, shape: Shape, tokenizer: Any, *, dtype: torch.dtype) -> None:
    """Writes a Hugging Face folder with normal weights of deviation 0.02, in files of 1 GiB; at most one of them is in memory."""
    from transformers import AutoModelForCausalLM

    config = llama_config(shape)
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        named = {name: tuple(value.shape) for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    pending: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    written = 0

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(pending, name))
        pending.clear()

    for name, size in named.items():
        value = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator).mul_(0.02)
        pending[name] = value.to(dtype)
        written += pending[name].nbytes
        if sum(tensor.nbytes for tensor in pending.values()) >= _SHARD_BYTES:
            flush()
    if pending:
        flush()
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def make_inputs(folder: Path, shape: Shape, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Prepares data and a model. Returns the sections of a configuration that name them."""
    source = folder / "interactions.csv"
    write_synthetic(source, users=200, items=300, positives=6000)
    titles = sorted({line.rsplit(",", 1)[1] for line in source.read_text(encoding="utf-8").splitlines()[1:]})
    write_model(folder / "model", shape, small_tokenizer(titles), dtype=dtype)
    return {
        "data": {"source": str(source), "path": str(folder / "prepared"), "split": "leave_one_out"},
        "prompt": {"instruction": "Watched:"},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "cluster": {"launcher": "local", "num_workers": 1, "use_gpu": False},
        "optimizer": {"schedule": "constant"},
        "plan": {"cluster": CLUSTER},
    }


def train(config: dict[str, Any], *, workers: int, log: Path, exact: bool = True) -> dict[str, Any]:
    """Trains to the end in `workers` processes. Returns rank 0's result and each rank's resident memory before the model.

    exact: freed memory returns to the system at once, so that resident memory is the memory in use.
    """
    quieten()
    parsed = pinned(RunConfig.model_validate(config))
    prepare(parsed)
    run = RunDirectory(Path(parsed.train.run_dir))
    run.claim(parsed.model_dump(mode="json"), to_yaml(parsed))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **(_EXACT if exact else {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [sys.executable, "-m", "benchmarks.whole_runs", str(run.config_path)]
    with log.open("w", encoding="utf-8") as output:
        ranks = [
            subprocess.Popen(
                [*line, str(rank), str(workers)], stdout=subprocess.PIPE, stderr=output, text=True, env=environment, cwd=ROOT
            )
            for rank in range(workers)
        ]
        try:
            with PrivateMemory([rank.pid for rank in ranks]) as private:
                answers = [rank.communicate()[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a worker failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    answered = [json.loads(answer.splitlines()[-1]) for answer in answers]
    return {
        **answered[0],
        "before_model_bytes": [each["before_model_bytes"] for each in answered],
        "private_bytes": private.most,
        "private_together_bytes": private.most_together,
    }


class PrivateMemory:
    """The peak of each process's own memory, and of their sum at one instant, read 50 times a second from start to end.

    A process's own memory is its anonymous and shared-memory pages. Resident memory (VmHWM) also counts pages of mapped
    files, such as weights being read, which the system reclaims when it needs them.
    """

    def __init__(self, processes: list[int]) -> None:
        self.most = [0] * len(processes)
        self.most_together = 0
        self._processes = processes
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "PrivateMemory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            held = [private_bytes(process) for process in self._processes]
            self.most = [max(pair) for pair in zip(self.most, held, strict=True)]
            self.most_together = max(self.most_together, sum(held))


def private_bytes(process: int) -> int:
    """Anonymous and shared-memory pages of a process in bytes; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return 1024 * sum(int(number) for number in re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", text, re.MULTILINE))


def step_rows(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the run's steps in metrics.jsonl."""
    return [row for row in RunDirectory(Path(config["train"]["run_dir"])).rows() if row.get("event") == "step"]


def predicted(config: dict[str, Any], *, workers: int) -> dict[str, Any]:
    """What `rec-dist plan` says of this configuration on that many workers of one thread each."""
    value = {**config, "cluster": {**config["cluster"], "launcher": "ray", "num_workers": workers, "cpus_per_worker": 1.0}}
    return make_plan(RunConfig.model_validate(value))


def _work(config_path: Path, rank: int, size: int) -> dict[str, Any]:
    """Runs one worker."""
    import deepspeed  # noqa: F401 - and the next: imports of the run do not count as memory of the model
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from rec_dist.runtime.world import World
    from rec_dist.training.worker import TrainJob, train_worker

    config = RunConfig.model_validate(yaml.safe_load(config_path.read_text(encoding="utf-8")))
    before = in_use_bytes("cpu")
    began = time.perf_counter()
    result = train_worker(
        World(rank, size, rank), TrainJob(config.model_dump(), config.train.run_dir, find_initial_weights(config))
    )
    return {**result, "before_model_bytes": before, "worker_seconds": time.perf_counter() - began}


if __name__ == "__main__":
    torch.set_num_threads(1)
    quieten()
    print(json.dumps(_work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
