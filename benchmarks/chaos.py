"""Goodput under faults: something is killed every ~45 s in a real run, which is then compared with an undisturbed one.

    python -m benchmarks.chaos --out chaos.json                15 minutes of faults, then the undisturbed run: about 25 minutes
    python -m benchmarks.chaos --minutes 2 --every 30          a short one
    python -m benchmarks.chaos --markdown chaos.json

Two Ray workers with DeepSpeed ZeRO-3 train S-DPO on synthetic interactions with a random model of 4 layers. At random times
the benchmark sends SIGKILL, SIGTERM or SIGSTOP to a worker, or SIGKILL or SIGTERM to the driver. When the driver has ended, the
benchmark starts the same command again, as a scheduler would. At the end it stops the run and trains an undisturbed one to the
same step: all saved numbers must be equal.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
import yaml
from safetensors.torch import load_file

from benchmarks import results
from benchmarks.loader import small_tokenizer, write_synthetic
from rec_dist.runtime.heartbeat import read_beats
from rec_dist.runtime.quiet import quieten

FAULTS = (("worker", "SIGKILL"), ("worker", "SIGTERM"), ("worker", "SIGSTOP"), ("driver", "SIGKILL"), ("driver", "SIGTERM"))
_TIMEOUT_SECONDS = 600.0


def make_inputs(folder: Path) -> dict[str, Any]:
    """Writes interactions and a model. Returns the configuration of a run that would take hours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = folder / "interactions.csv"
    write_synthetic(source, users=2000, items=800, positives=60_000)
    titles = sorted({line.rsplit(",", 1)[1] for line in source.read_text(encoding="utf-8").splitlines()[1:]})
    tokenizer = small_tokenizer(titles)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=None, eos_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return {
        "data": {"source": str(source), "path": str(folder / "prepared"), "split": "leave_one_out", "min_rating": 4.0},
        "negatives": {"num": 3},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "task": {"kind": "sdpo", "reference": "online"},
        "train": {"run_dir": str(folder / "chaos"), "epochs": 50, "global_batch_size": 8, "max_tokens_per_micro_batch": 512},
        "optimizer": {"schedule": "constant"},
        "cluster": {"num_workers": 2, "cpus_per_worker": 0.5, "use_gpu": False, "hang_seconds": 60.0, "max_restarts": 1000},
        "checkpoint": {"every_steps": 10, "grace_seconds": 60.0},
    }


class Run:
    """`rec-dist train` on one configuration, started as often as needed."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.path = Path(config["train"]["run_dir"])
        self._file = folder / f"{self.path.name}.yaml"
        self._file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self._errors = folder / f"{self.path.name}.err"
        self.starts = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self._errors.open("ab") as errors:
            line = [sys.executable, "-m", "rec_dist", "train", str(self._file)]
            return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=errors, env=environment)

    def errors(self) -> str:
        """The end of its standard error."""
        return self._errors.read_text(encoding="utf-8", errors="replace")[-3000:]

    def keep_up(self) -> None:
        """Starts the command again if it has ended."""
        code = self.process.poll()
        if code is not None:
            assert code in (0, 1, 75, -signal.SIGKILL), self.errors()
            self.process = self._start()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; empty before the file exists."""
        path, rows = self.path / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:  # the line is still being written
                continue
        return rows

    def workers(self) -> list[int]:
        """Process ids of the ranks that are training now."""
        return [beat.pid for beat in read_beats(self.path / "attempt") if psutil.pid_exists(beat.pid)]

    def steps_again(self, resumed: int) -> bool:
        """Whether the run has resumed more than `resumed` times and then made a step."""
        events = [row["event"] for row in self.rows() if row["event"] in ("step", "resume")]
        return events.count("resume") > resumed and events[-1] == "step"

    def resumptions(self) -> int:
        return sum(row["event"] == "resume" for row in self.rows())

    def end(self) -> int:
        """Asks the run to stop and returns the step of its last checkpoint."""
        code = None
        while code != 75:
            self.keep_up()
            self.wait_for_steps(self.resumptions() - 1)
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(timeout=_TIMEOUT_SECONDS)
        return max(int(row["step"]) for row in self.rows() if row["event"] == "checkpoint")

    def wait_for_steps(self, resumed: int) -> None:
        """Waits until steps_again(resumed) is true or the process ends."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not self.steps_again(resumed) and self.process.poll() is None:
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.2)


def strike(run: Run, draw: random.Random) -> dict[str, Any] | None:
    """Injects one fault and measures the seconds until the run steps again. Returns None if there was no worker to hit."""
    target, name = draw.choice(FAULTS)
    workers = run.workers()
    if target == "worker" and not workers:
        return None
    resumed, began = run.resumptions(), time.monotonic()
    os.kill(draw.choice(workers) if target == "worker" else run.process.pid, getattr(signal, name))
    deadline = began + _TIMEOUT_SECONDS
    while not run.steps_again(resumed):
        assert time.monotonic() < deadline, "the run did not recover"
        run.keep_up()
        time.sleep(0.2)
    return {"target": target, "signal": name, "seconds": time.monotonic() - began}


def disturb(run: Run, *, minutes: float, every: float, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Returns the faults and the seconds from the first checkpoint to the end."""
    draw = random.Random(seed)
    while not any(row["event"] == "checkpoint" for row in run.rows()):
        assert run.process.poll() is None, f"the run ended before its first checkpoint: {run.errors()}"
        time.sleep(0.2)
    began, faults = time.monotonic(), []
    while time.monotonic() - began < minutes * 60:
        time.sleep(draw.uniform(0.5, 1.5) * every)
        run.keep_up()
        fault = strike(run, draw)
        if fault is not None:
            faults.append(fault)
            print(f"{time.monotonic() - began:6.0f} s: {fault}", file=sys.stderr, flush=True)
    return faults, time.monotonic() - began


def undisturbed(folder: Path, config: dict[str, Any], step: int) -> Run:
    """Trains the same run without faults until it stops after `step`."""
    run = Run(folder, {**config, "train": {**config["train"], "run_dir": str(folder / "alone")}})
    while not (run.path / "config.json").is_file():
        time.sleep(0.1)
    (run.path / "stop").write_text(str(step), encoding="utf-8")
    assert run.process.wait() == 75
    return run


def state_of(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and Adam's state."""
    files = sorted((run.path / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def measure(minutes: float, every: float, seed: int) -> dict[str, Any]:
    """Makes both runs and compares them."""
    quieten()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_inputs(folder)
        line = [sys.executable, "-m", "rec_dist", "prepare"]
        chaos_file = folder / "prepare.yaml"
        chaos_file.write_text(yaml.safe_dump(config), encoding="utf-8")
        subprocess.run([*line, str(chaos_file)], check=True, capture_output=True)
        run = Run(folder, config)
        faults, seconds = disturb(run, minutes=minutes, every=every, seed=seed)
        last = run.end()
        alone = undisturbed(folder, config, last)
        mine, theirs = state_of(run, last), state_of(alone, last)
        losses = [
            [(row["step"], row["loss"], row["grad_norm"]) for row in r.rows() if row["event"] == "step"] for r in (run, alone)
        ]
        same = mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)
        repeated = sum(int(row["repeated"]) for row in run.rows() if row["event"] == "resume")
        step_seconds = statistics.median(row["step_seconds"] for row in alone.rows() if row["event"] == "step")
        return {
            "faults": faults,
            "seconds": seconds,
            "steps": last,
            "steps_executed": last + repeated,
            "undisturbed_step_seconds": step_seconds,
            "commands": run.starts,
            "tensors": len(theirs),
            "same": bool(same and theirs and losses[0] == losses[1]),
        }


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the tables of a result."""
    times = [fault["seconds"] for fault in result["faults"]]
    kinds = sorted({(fault["target"], fault["signal"]) for fault in result["faults"]})
    rows = []
    for target, name in kinds:
        own = [fault["seconds"] for fault in result["faults"] if (fault["target"], fault["signal"]) == (target, name)]
        rows.append(
            {
                "fault": f"{name} to a {target}",
                "times": len(own),
                "median s until it steps": statistics.median(own),
                "most": max(own),
            }
        )
    useful = result["steps"] * result["undisturbed_step_seconds"]
    totals = {
        "minutes": result["seconds"] / 60,
        "faults": len(times),
        "useful steps": result["steps"],
        "steps executed": result["steps_executed"],
        "useful / executed": f"{result['steps'] / result['steps_executed']:.1%}",
        "goodput in time": f"{useful / result['seconds']:.1%}",
        "restart s, p50": statistics.median(times) if times else None,
        "same result": "yes, bit for bit" if result["same"] else "NO",
    }
    return "\n\n".join([*(results.table(part, markdown=markdown) for part in ([totals], rows)), results.stamp(result)])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="how long faults are injected")
    parser.add_argument("--every", type=float, default=45.0, help="mean seconds from a recovery to the next fault")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return 0
    measured = measure(given.minutes, given.every, given.seed)
    result = {**results.facts(results.command_of("benchmarks.chaos", words)), **measured}
    results.conclude(result, report, given.out)
    return 0 if result["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
