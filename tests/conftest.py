"""Fixtures that tests share: a tokenizer, language models and a data set, all tiny, made offline, and equal on every machine.

Cost: about 4 s a session, imports included. The data set can be learned (the next item mostly follows from the last one), so
that a test can check for progress and not only for the absence of a crash.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Set before torch and transformers are imported: with one thread sums are equal everywhere, and offline nothing is looked up.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest

from rec_dist.runtime.quiet import quieten

quieten()

NUM_USERS, NUM_ITEMS = 60, 80
STEP = 7  # item i is mostly followed by item (i + STEP) % NUM_ITEMS
VOCABULARY = 320
ADJECTIVES = ("Silent", "Golden", "Last", "Broken", "Hidden", "Electric", "Distant", "Paper", "Winter", "Crimson")
NOUNS = ("River", "Garden", "Letter", "Empire", "Mirror", "Harbour", "Engine", "Orchard")
TITLES = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


LONGEST_FIRST = (
    "distributed/test_faults.py",
    "triton/test_interpreter.py",
    "distributed/test_ray.py",
    "distributed/test_gauges.py",
    "distributed/test_remote_copy.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose single tests take longest come first: in two processes, one of them last would leave the other idle."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(Path(__file__).parent).as_posix(), len(places)))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of VOCABULARY tokens, learned from the titles; `<eos>` is token 0, and there is no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(
        [f" {title}" for title in TITLES] + ["A user watched these movies, one after another:\n-"] * 9, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A Hugging Face folder: a random Llama (2 layers, width 32, 512 positions, tied) and the tiny tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv file of NUM_USERS users, each with 8 to 16 positives rated 4 or 5 and 3 explicit negatives rated 1 or 2."""
    rng = np.random.default_rng(7)
    lines = ["user,item,rating,timestamp,title,categories"]
    for user in range(NUM_USERS):
        length = int(rng.integers(8, 17))
        walk = [int(rng.integers(NUM_ITEMS))]
        while len(walk) < length:
            follower = (walk[-1] + STEP) % NUM_ITEMS
            if follower in walk or rng.random() < 0.1:
                follower = int(rng.choice(np.setdiff1d(np.arange(NUM_ITEMS), walk)))
            walk.append(follower)
        explicit_negatives = rng.choice(np.setdiff1d(np.arange(NUM_ITEMS), walk), size=3, replace=False).tolist()
        events = [(item, int(rng.integers(4, 6))) for item in walk]
        for item in explicit_negatives:
            events.insert(int(rng.integers(len(events) - 2)), (item, int(rng.integers(1, 3))))
        start = int(rng.integers(100_000))
        for place, (item, rating) in enumerate(events):
            category = TITLES[item].split()[1]
            lines.append(f"u{user:03d},i{item:03d},{rating},{start + place * 60},{TITLES[item]},{category}")
    path = tmp_path_factory.mktemp("tiny-source") / "interactions.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_source: Path) -> Path:
    """The prepared data set of tiny_source: leave-one-out, so that every user is in every split."""
    from rec_dist.config.schema import DataConfig
    from rec_dist.data.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny-data") / "prepared"
    settings = DataConfig(source=str(tiny_source), path=str(folder), split="leave_one_out", min_rating=3.0)
    prepare(settings)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_source: Path, tiny_data: Path, tiny_model_dir: Path) -> Callable[..., dict[str, Any]]:
    """make(run_dir, "task.kind=sdpo", ...) or make(run_dir, {"task.beta": 0.5}): a dict for RunConfig.model_validate.

    A LoRA run of 4 steps in this process (cluster.launcher=local) on the tiny model and data.
    """

    def make(run_dir: Path | str, *changes: str | dict[str, Any]) -> dict[str, Any]:
        from omegaconf import OmegaConf

        config: dict[str, Any] = {
            "data": {"source": str(tiny_source), "path": str(tiny_data), "split": "leave_one_out", "min_rating": 3.0},
            "prompt": {"max_history": 5, "instruction": "A user watched:"},
            "negatives": {"kind": "uniform", "num": 3},
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
            "task": {"kind": "sft", "beta": 1.0, "reference": "cached"},
            "train": {
                "run_dir": str(run_dir),
                "max_steps": 4,
                "epochs": 2,
                "global_batch_size": 8,
                "max_tokens_per_micro_batch": 512,
                "seed": 0,
            },
            "optimizer": {"lr": 5e-3, "schedule": "constant"},
            "cluster": {"launcher": "local", "num_workers": 1, "use_gpu": False, "zero_stage": 0},
            "checkpoint": {"every_steps": 2, "keep": 3},
            "evaluate": {"split": "test", "num_candidates": 10, "max_users": 20, "seed": 0},
        }
        tree = OmegaConf.create(config)
        for change in changes:
            if isinstance(change, str):
                tree.merge_with_dotlist([change])
            else:
                for key, value in change.items():
                    OmegaConf.update(tree, key, value)
        result = OmegaConf.to_container(tree, resolve=True)
        assert isinstance(result, dict)
        return {str(key): value for key, value in result.items()}

    return make
