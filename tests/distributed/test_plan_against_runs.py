"""What `rec-dist plan` says a rank holds equals what the ranks of a real run held, for each ZeRO stage, on 1 and 2 workers.

Cost: the tiny runs are shared with other tests. With `-m slow` a model of SmolLM2-135M's shape with random weights runs too,
about 10 s a run.
"""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE_135M = ROOT / "configs" / "plan" / "models" / "smollm2-135m"


@pytest.fixture(scope="module")
def model_135m(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """SmolLM2-135M's shape, random float32 weights, the tiny tokenizer: 540 MB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model-135m")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHAPE_135M)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def predicted(folder: Path, config: Any, *, stage: int, workers: int) -> tuple[int, int]:
    """(bytes of parameters that a rank holds, bytes of all of them)."""
    from rec_dist.engine.settings import engine_settings
    from rec_dist.methods.language_model.builders import lora_spec
    from rec_dist.models.architecture import count_parameters, read_architecture
    from rec_dist.sizing.shares import held_parameters
    from rec_dist.sizing.stage import zero_of

    trained = config.prompt.num_virtual if config.adapter.kind == "soft_prompt" else 0
    parameters = count_parameters(folder, lora_spec(config), num_virtual=trained)
    assert config.cluster.zero_stage == stage
    width = read_architecture(folder).width
    zero = zero_of(engine_settings(config, zero_stage=stage, width=width, bf16=False, workers=workers, on_gpu=False))
    return 4 * held_parameters(parameters, zero, workers), 4 * parameters.total


def compare(trainer: Any, model: Path, *changes: str, stage: int, workers: int) -> None:
    from rec_dist.config.load import load_config

    run = trainer.once(*changes, f"cluster.zero_stage={stage}", workers=workers)
    measured = (run.finished["parameter_bytes_rank0"], run.finished["parameter_bytes_whole"])
    expected = predicted(model, load_config(run.path / "config.yaml"), stage=stage, workers=workers)
    print(f"{model.name} ZeRO-{stage} x {workers}: predicted {expected[0]:,}, measured {measured[0]:,} of {measured[1]:,} bytes")
    assert measured == expected


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_tiny_model(trainer: Any, tiny_model_dir: Path, stage: int, workers: int) -> None:
    compare(trainer, tiny_model_dir, "task.kind=sft", stage=stage, workers=workers)


@pytest.mark.parametrize(("stage", "workers"), [(0, 1), (3, 2)])
def test_soft_prompts_before_a_tiny_model(trainer: Any, tiny_model_dir: Path, stage: int, workers: int) -> None:
    changes = ("adapter.kind=soft_prompt", "prompt.num_virtual=20", "task.delrec.top_h=3", "task.delrec.teacher=random")
    sizes = ("negatives.num=5", "train.global_batch_size=4", "train.max_tokens_per_micro_batch=4096", "train.max_steps=2")
    compare(trainer, tiny_model_dir, "task.kind=delrec_distill", *changes, *sizes, stage=stage, workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "workers"), [(0, 1), (0, 2), (2, 2), (3, 1), (3, 2)])
def test_a_model_of_135_million(trainer: Any, model_135m: Path, stage: int, workers: int) -> None:
    changes = (f"model.path={model_135m}", "train.max_steps=1", "train.global_batch_size=2", "checkpoint.every_steps=100")
    compare(trainer, model_135m, "task.kind=sft", *changes, stage=stage, workers=workers)
