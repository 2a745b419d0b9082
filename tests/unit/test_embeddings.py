"""Item embeddings: written whole or not at all, tied to their data, reduced by PCA, and used to initialise recommenders."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_recommenders import CYCLE, config, train

from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.embeddings import PartFiles, read_embeddings, read_manifest
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.methods.language_model.embedding import cut
from rec_dist.methods.sequential.initial_embeddings import initial_items, principal_components
from rec_dist.methods.sequential.task import build_sequential_task
from rec_dist.storage.checksums import parse_manifest, write_manifest

WIDTH = 24


def vectors(num_items: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_items, WIDTH)) * np.linspace(3, 0.5, WIDTH) + 5).astype(np.float32)


def write(folder: Path, values: np.ndarray, *, data: str, parts: int = 3) -> Path:
    starts = np.linspace(0, len(values), parts + 1).astype(int).tolist()
    files = PartFiles(folder, "key", starts)
    for part in reversed(range(parts)):
        files.write(part, values[starts[part] : starts[part + 1]])
    files.join({"inputs": {"data": data}})
    return folder


def test_both_files_hold_what_was_written(tmp_path):
    values = vectors(11)
    folder = write(tmp_path / "items", values, data="d")
    assert sorted(path.name for path in folder.iterdir()) == ["embeddings.arrow", "embeddings.json", "embeddings.safetensors"]
    assert np.array_equal(np.concatenate(read_embeddings(folder, data_fingerprint="d")), values)
    assert np.array_equal(load_file(folder / "embeddings.safetensors")["embeddings"], values)
    manifest = read_manifest(folder)
    assert (manifest["num_items"], manifest["width"]) == (11, WIDTH)
    assert read_manifest(tmp_path) is None


def test_a_part_counts_only_when_it_is_current_and_whole(tmp_path):
    files = PartFiles(tmp_path, "key", [0, 4, 7])
    assert not files.is_current(0)
    files.write(0, vectors(4))
    assert files.is_current(0)
    assert not PartFiles(tmp_path, "other", [0, 4, 7]).is_current(0)
    assert not PartFiles(tmp_path, "key", [0, 3, 7]).is_current(0)
    path = files.path(0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not files.is_current(0), "a flipped bit"
    path.write_bytes(content[:-5])
    assert not files.is_current(0), "cut short"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "a temporary file was left"


@pytest.mark.parametrize("name", ["embeddings.arrow", "embeddings.safetensors"])
def test_a_changed_byte_is_noticed(tmp_path, name):
    folder = write(tmp_path / "items", vectors(11), data="d")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} has changed"):
        read_embeddings(folder, data_fingerprint="d")


def test_micro_batches_hold_neighbours_within_the_budget():
    lengths = np.asarray([5, 5, 6, 1, 9, 10, 2, 3])
    begins = cut(lengths, 10).tolist()
    assert begins == [0, 2, 4, 5, 6, 8]
    assert all(lengths[a:b].sum() <= 10 for a, b in pairwise(begins))


def test_components_are_those_of_a_plain_svd_with_fixed_signs():
    values = vectors(200).astype(np.float64)
    found = principal_components(
        [values[:50].astype(np.float32), values[50:51].astype(np.float32), values[51:].astype(np.float32)], 6
    )
    left, sizes, right = np.linalg.svd(
        values.astype(np.float32).astype(np.float64) - values.astype(np.float32).mean(0, dtype=np.float64)
    )
    signs = np.sign(right[np.arange(6), np.abs(right[:6]).argmax(axis=1)])
    np.testing.assert_allclose(found, left[:, :6] * sizes[:6] * signs, rtol=1e-7, atol=1e-7)
    flipped = principal_components([-values.astype(np.float32)], 6)
    np.testing.assert_allclose(flipped, -found, rtol=1e-7, atol=1e-7)


def test_the_scale_is_that_of_a_random_table(tmp_path):
    folder = write(tmp_path / "items", vectors(500), data="d")
    for width in (4, 16):
        table = initial_items(folder, data_fingerprint="d", width=width)
        assert table.dtype == torch.float32
        assert float(table.std(correction=0)) == pytest.approx(width**-0.5, rel=1e-5)
        assert table.mean(dim=0).abs().max() < 1e-5
        spread = table.std(dim=0)
        assert bool((spread[:-1] >= spread[1:]).all()), "what matters more stays larger"


def test_what_pca_cannot_give_is_refused(tmp_path):
    values = vectors(11)
    with pytest.raises(
        UserError, match=r"task\.sequential\.width \(16\) is more than the 10 directions in which 11 item vectors of width 24"
    ):
        principal_components([values], 16)
    values[:, 3:] = 1
    with pytest.raises(UserError, match=r"task\.sequential\.width \(8\) is more than the \d directions in which"):
        principal_components([values], 8)
    values[2, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        principal_components([values], 2)


def recommender(tmp_path: Path, **more: Any) -> RunConfig:
    return config(tmp_path, epochs=2, more=more)


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
def test_a_recommender_starts_from_them_and_trains_them(tmp_path, kind):
    plain = build_sequential_task(config(tmp_path, kind=kind, width=8, epochs=2))
    data = PreparedData.open(tmp_path / "data")
    folder = write(tmp_path / "items", vectors(data.num_items), data=data.manifest.fingerprint)
    task = build_sequential_task(config(tmp_path, kind=kind, width=8, epochs=2, more={"init_embeddings": str(folder)}))
    expected = initial_items(folder, data_fingerprint=data.manifest.fingerprint, width=8)
    first, other = task.model.build().model, plain.model.build().model
    assert torch.equal(first.item_embedding.weight, expected)
    assert first.item_embedding.weight.requires_grad
    for (name, value), (_, drawn) in zip(first.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(value, drawn) == (name != "item_embedding.weight"), "all else starts as without them"
    trained = train(task)
    assert not torch.allclose(trained.item_embedding.weight, expected, atol=1e-3)


def test_embeddings_of_another_catalogue_are_refused(tmp_path):
    config(tmp_path)
    folder = write(tmp_path / "items", vectors(CYCLE), data="another")
    with pytest.raises(UserError, match=r"were made from another data set"):
        build_sequential_task(recommender(tmp_path, init_embeddings=str(folder)))
    with pytest.raises(UserError, match=r"holds no item embeddings .*`rec-dist embed`"):
        build_sequential_task(recommender(tmp_path, init_embeddings=str(tmp_path / "nowhere")))
    (folder / "embeddings.json").write_text(json.dumps({"format_version": 9}))
    with pytest.raises(UserError, match="format version 9"):
        build_sequential_task(recommender(tmp_path, init_embeddings=str(folder)))


@pytest.mark.parametrize("changed", [{"inputs": []}, {"inputs": {}}, {"files": [{"name": "x"}]}, {"files": None}])
def test_a_description_of_other_fields_is_refused(tmp_path, changed):
    folder = write(tmp_path / "items", vectors(11), data="d")
    path = folder / "embeddings.json"
    write_manifest(path, 2, {**parse_manifest(path.read_bytes(), 2), **changed})
    with pytest.raises(UserError, match=r"embeddings\.json has other fields .*remove that folder and run `rec-dist embed` again"):
        read_embeddings(folder, data_fingerprint="d")


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_kill_leaves_is_no_other_file_and_goes(tiny_config, tmp_path, finished):
    """Covers a kill between the two writes of a progress file, in the joined table, and before the parts were removed."""
    from rec_dist.cli import main

    folder = tmp_path / "items"
    (tmp_path / "config.yaml").write_text(json.dumps(tiny_config(tmp_path / "run")), encoding="utf-8")
    words = ["embed", str(tmp_path / "config.yaml"), str(folder)]
    if finished:
        assert main(words) == 0
    (folder / "parts").mkdir(parents=True)
    left = ("progress.tmp", "progress.json", "log.txt", ".embeddings.arrow.123.tmp", "parts/.part-000000.safetensors.123.tmp")
    for name in left:
        (folder / name).write_bytes(b"half")
    assert main(words) == 0
    names = ["embeddings.arrow", "embeddings.json", "embeddings.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *names]
