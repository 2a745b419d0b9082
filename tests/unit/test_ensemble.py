"""Ensembles: weights against a solver of another kind, shares by hand, and a run through train, evaluate and its errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_recommenders import config as small_config

import rec_dist
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.commands.verify import verify
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, PopularityScorer
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.ensemble.method import learn
from rec_dist.methods.ensemble.ranker import EnsembleScorer
from rec_dist.methods.ensemble.rerank import Reading, Retrieval, best_places, spread
from rec_dist.methods.ensemble.saved_model import EnsembleWeights
from rec_dist.methods.ensemble.weights import Questions, fit_weights
from rec_dist.methods.registry import method_of

RIDGE = 1e-2


def _questions(seed: int = 0, num: int = 60, items: int = 12) -> Questions:
    """Targets drawn from a softmax of the first two features; the third says nothing, the fourth repeats the first."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, items, 4)).astype(np.float32)
    features[:, :, 1] *= 30
    features[:, :, 3] = features[:, :, 0]
    ranked = rng.random((num, items)) < 0.9
    scores = np.where(ranked, 1.5 * features[:, :, 0] + 0.05 * features[:, :, 1], -np.inf)
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    targets = np.asarray([rng.choice(items, p=row) for row in shares])
    return Questions(features, targets, ranked)


def _loss(questions: Questions, weights: torch.Tensor, scales: np.ndarray) -> torch.Tensor:
    """The objective as its docstring writes it, in float64."""
    scores = torch.from_numpy(questions.features).double() @ weights
    scores = scores.masked_fill(~torch.from_numpy(questions.ranked), -torch.inf)
    targets = torch.from_numpy(questions.targets)
    nll = torch.nn.functional.cross_entropy(scores, targets)
    return nll + RIDGE / 2 * ((weights * torch.from_numpy(scales)) ** 2).sum()


def test_the_weights_are_where_the_gradient_of_the_objective_is_zero():
    questions, free = _questions(), np.full(4, -np.inf)
    scales = questions.scales()
    found = fit_weights(questions, scales, at_least=free, ridge=RIDGE, used=np.ones(4, dtype=bool))
    weights = torch.from_numpy(found).requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(questions, weights, scales), weights)
    assert np.abs(gradient.numpy() / scales).max() < 1e-3
    assert found[0] > 0.3 and found[1] > 0.02  # what the targets were drawn by
    assert found[0] == pytest.approx(found[3], rel=1e-2)  # two features that are one share its weight


def test_a_weight_at_its_bound_and_an_unused_feature_are_zero():
    questions = _questions()
    questions.features[:, :, 2] = -questions.features[:, :, 0]  # a member that is wrong
    used = np.asarray([False, True, True, False])
    found = fit_weights(questions, questions.scales(), at_least=np.zeros(4), ridge=RIDGE, used=used)
    assert found.tolist()[0] == found.tolist()[3] == 0.0
    assert found[2] == 0.0 and found[1] > 0


def test_a_constant_of_a_question_changes_nothing():
    questions = _questions()
    shifted = Questions(questions.features + np.arange(60, dtype=np.float32)[:, None, None], questions.targets, questions.ranked)
    arguments = {"at_least": np.full(4, -np.inf), "ridge": RIDGE, "used": np.ones(4, dtype=bool)}
    one = fit_weights(questions, questions.scales(), **arguments)
    other = fit_weights(shifted, shifted.scales(), **arguments)
    np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-3)


def test_the_weights_without_a_member_are_those_of_the_smaller_ensemble():
    questions = _questions()
    names = ["a.title", "a.next", "b", "seen"]
    learnt = learn(questions, names, ["a", "b"], ["seen"], ridge=RIDGE)
    keep = [2, 3]
    smaller = learn(
        Questions(questions.features[:, :, keep], questions.targets, questions.ranked),
        ["b", "seen"],
        ["b"],
        ["seen"],
        ridge=RIDGE,
    )
    assert learnt.owners == ["a", "b", "seen"]
    np.testing.assert_allclose(learnt.without[0], [0, 0, *smaller.weights], rtol=1e-3, atol=1e-5)


def test_what_is_retrieved_and_what_was_read_by_hand() -> None:
    """Of the items outside the history the two best are retrieved; what is not read has the mean of what was."""
    history, items = np.asarray([7], dtype=np.int32), np.asarray([5, 7, 2, 9, 3], dtype=np.int32)
    retrieval = Retrieval(2, ["a", "b"], np.asarray([1.0, -2.0]))
    features = {"a": [np.asarray([1.0, 9.0, 3.0, 4.0, 3.0])], "b": [np.asarray([0.0, 0.0, 0.0, 1.0, 0.5])]}
    (places,) = retrieval.places(features, [history], [items])  # 1, (seen), 3, 2, 2: of the tie, the smaller item
    assert places.tolist() == [2, 4]
    assert spread(np.asarray([-1.0, -4.0]), places, 5).tolist() == [0, 0, 1.5, 0, -1.5]
    examples = [EvalExample(0, 3, target, history, items) for target in (3, 9)]
    read = Reading([places, places[:0]], {"model": [np.asarray([-1.0, -4.0]), np.empty(0)]})
    assert read.found(0, examples).tolist() == [1, 0]
    assert read.found(1, examples[1:]).tolist() == [0]
    assert [row.tolist() for row in read.features(0, [items, items])["model"]] == [[0, 0, 1.5, 0, -1.5], [0] * 5]


def test_a_random_reader_gets_no_weight_from_being_retrieved() -> None:
    """Targets are mostly among what is retrieved, and the reader scores at random: its weight is near 0."""
    rng = np.random.default_rng(0)
    quick = rng.normal(size=(400, 30))
    targets = np.asarray([int(rng.choice(30, p=np.exp(row) / np.exp(row).sum())) for row in quick * 2])
    nothing = np.empty(0, dtype=np.int32)
    reader = np.stack([spread(rng.normal(size=8), best_places(row, nothing, np.arange(30), 8), 30) for row in quick])
    questions = Questions(np.stack([quick, reader], axis=2).astype(np.float32), targets, np.ones((400, 30), dtype=bool))
    learnt = learn(questions, ["quick", "reader"], ["quick", "reader"], [], ridge=RIDGE)
    assert learnt.weights[0] > 1.5 and learnt.weights[1] < 0.15


def _member(folder: Path, name: str, kind: str, **more: object) -> str:
    value = small_config(folder, cycle=23).model_dump(exclude_unset=True)
    task = {**value["task"], "kind": kind} if kind == "sequential" else {"kind": kind}
    train = {**value["train"], "run_dir": str(folder / name), "max_steps": 4, **more}
    return str(rec_dist.train({**value, "task": task, "train": train, "cluster": {"launcher": "local"}}).path)


def _ensemble(folder: Path, members: dict[str, str], name: str = "ensemble", **keys: object) -> dict:
    value = small_config(folder, cycle=23).model_dump(exclude_unset=True)
    task = {"kind": "ensemble", "ensemble": {"members": members, **keys}}
    return {**value, "task": task, "train": {"run_dir": str(folder / name)}, "cluster": {"launcher": "local"}}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("members")
    sasrec = _member(folder, "sasrec", "sequential")
    return folder, {"neighbours": _member(folder, "neighbours", "neighbours"), "sasrec": sasrec}


def test_a_run_ranks_by_the_weighted_sum_and_tells_the_share_of_each_member(members):
    folder, runs = members
    run = rec_dist.train(_ensemble(folder, runs))
    metrics = rec_dist.evaluate(run, ["evaluate.num_candidates=all"])
    row = run.metrics("evaluation")[-1]
    learnt = EnsembleWeights.read(run.model_path)
    assert learnt.features == ["neighbours.title", "neighbours.next", "sasrec", "popularity", "seen", "last_item"]
    assert learnt.weights[1] > 0
    # in this data set the next item is certain, and only the neighbours know it after four steps of SASRec
    assert metrics["hr@1"]["value"] == 1.0
    assert row["shares"]["neighbours"]["ndcg@10"]["value"] > 0
    smaller = rec_dist.train(_ensemble(folder, {"sasrec": runs["sasrec"]}, name="smaller"))
    drop = metrics["ndcg@10"]["value"] - rec_dist.evaluate(smaller, ["evaluate.num_candidates=all"])["ndcg@10"]["value"]
    assert row["shares"]["neighbours"]["ndcg@10"]["value"] == pytest.approx(drop, abs=0.02)


def test_a_ranking_says_what_each_member_adds(members):
    folder, runs = members
    run = rec_dist.train({**_ensemble(folder, runs), "train": {"run_dir": str(folder / "explained")}})
    names = open_data(run.config.data).raw_items
    history = {"u": names[:3], "nobody": []}
    candidates = dict.fromkeys(history, names[4:9])
    for table in (rec_dist.rank(run, history, top_k=4), rec_dist.rank(run, history, top_k=4, candidates=candidates)):
        columns = ["score_neighbours", "score_sasrec", "score_popularity", "score_seen", "score_last_item"]
        assert table.schema.names[6:] == columns
        for row in table.to_pylist():
            parts = [row[name] for name in columns]
            assert parts == [None] * 5 if row["fallback"] else sum(parts) == pytest.approx(row["score"], abs=1e-9)
        assert {row["user_id"] for row in table.to_pylist() if row["fallback"]} == {"nobody"}


def test_an_ensemble_keeps_its_members(members, tmp_path: Path):
    import shutil

    folder, runs = members
    mine = tmp_path / "copy"
    shutil.copytree(folder, mine)
    moved = {name: str(mine / Path(path).name) for name, path in runs.items()}
    run = rec_dist.train({**_ensemble(folder, moved, name="kept"), "train": {"run_dir": str(tmp_path / "kept")}})
    shutil.rmtree(mine)
    assert rec_dist.evaluate(run, ["evaluate.num_candidates=all"])["hr@1"]["n"] > 0
    before = (run.path / "metrics.jsonl").read_bytes()
    same = {**_ensemble(folder, moved, name="kept"), "train": {"run_dir": str(tmp_path / "kept")}}
    assert rec_dist.train(same).path == run.path, "it is finished, and needs its members no more"
    assert (run.path / "metrics.jsonl").read_bytes() == before
    others = (
        {"train": {"run_dir": str(tmp_path / "new")}},
        {"task": {"kind": "ensemble", "ensemble": {"members": moved, "ridge": 7.0}}},
    )
    for other in others:
        with pytest.raises(rec_dist.UserError, match=r"task\.ensemble\.members\.\w+ .* is no run directory"):
            rec_dist.train({**same, **other})


def test_text_from_the_environment_in_a_member_is_not_needed_where_the_command_has_its_own(members, tmp_path: Path):
    import shutil

    folder, runs = members
    mine = tmp_path / "sasrec"
    shutil.copytree(runs["sasrec"], mine)
    config = mine / "config.yaml"
    plain = yaml.safe_load(config.read_text(encoding="utf-8"))

    def saved_with(section: str, key: str) -> None:
        config.write_text(yaml.safe_dump({**plain, section: {**plain[section], key: "${oc.env:NAME}"}}), encoding="utf-8")

    saved_with("cluster", "address")
    value = {**_ensemble(folder, {"sasrec": str(mine)}), "train": {"run_dir": str(tmp_path / "one")}}
    assert rec_dist.evaluate(rec_dist.train(value), ["evaluate.num_candidates=all"])["hr@1"]["n"] > 0
    assert rec_dist.Run.open(mine).config.cluster.address == "${oc.env:NAME}"
    saved_with("model", "revision")
    with pytest.raises(rec_dist.UserError, match=r"model\.revision .* came from the environment.*; train that run again"):
        rec_dist.train({**value, "train": {"run_dir": str(tmp_path / "two")}})


def test_an_ensemble_may_be_a_member(members, tmp_path: Path):
    folder, runs = members
    inner = rec_dist.train({**_ensemble(folder, runs), "train": {"run_dir": str(tmp_path / "inner")}})
    outer = rec_dist.train({**_ensemble(folder, {"all": str(inner.path)}), "train": {"run_dir": str(tmp_path / "outer")}})
    assert rec_dist.evaluate(outer, ["evaluate.num_candidates=all"])["hr@1"]["value"] == 1.0


@pytest.mark.parametrize("within", [False, True], ids=["beside an ensemble", "within one"])
def test_a_language_model_and_an_ensemble_in_an_ensemble_are_searched(
    within: bool, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The items of a search are the best of all scores. An ensemble without a language model is no member to search."""
    model = ranked_model(tiny_config(tmp_path / "run"), ())

    def ensemble(weights: list[float], **members: CandidateScorer) -> EnsembleScorer:
        names, values = list(members), np.asarray(weights)
        learnt = EnsembleWeights(names, [], names, names, values, np.zeros((len(names), len(names))), np.ones(len(names)))
        return EnsembleScorer(learnt, members, model.data)

    popularity = PopularityScorer(model.data.train_counts)
    history, every = np.asarray([3, 5], dtype=np.int32), np.arange(model.data.num_items, dtype=np.int32)
    with model.scorer() as titles:
        if within:
            outer = ensemble([0.1, 2.0], counts=popularity, both=ensemble([0.3, 0.7], counts=popularity, titles=titles))
        else:
            outer = ensemble([1.4, 2.0], titles=titles, counts=ensemble([0.35], counts=popularity))
        (scores,) = outer.score([history], [every])
        found = outer.search(history).top_k(5, beam=3)
        assert found.certified
        assert found.scores == pytest.approx(np.sort(scores)[::-1][:5], abs=1e-4)
        assert scores[found.items] == pytest.approx(found.scores, abs=1e-4)
        alone = ensemble([1.0], inner=ensemble([1.0], counts=popularity))
        with pytest.raises(UserError, match=r"exactly one member that can be searched .* none"):
            alone.search(history)


def test_another_fit_of_a_member_ranks_in_its_place(members, tmp_path: Path):
    folder, runs = members
    value = small_config(folder, cycle=23).model_dump(exclude_unset=True)
    task = {"kind": "neighbours", "neighbours": {"splits": ["train", "valid"]}}
    run_dir = {"run_dir": str(tmp_path / "all")}
    everything = rec_dist.train({**value, "task": task, "train": run_dir, "cluster": {"launcher": "local"}})
    keys = {
        **_ensemble(folder, runs, served={"neighbours": str(everything.path)}),
        "train": {"run_dir": str(tmp_path / "served")},
    }
    run = rec_dist.train(keys)
    name = "neighbours.safetensors"
    assert (run.model_path / "members/neighbours/model" / name).read_bytes() == (everything.model_path / name).read_bytes()
    plain = rec_dist.train({**_ensemble(folder, runs), "train": {"run_dir": str(tmp_path / "plain")}})
    weights = [EnsembleWeights.read(one.model_path).weights for one in (run, plain)]
    np.testing.assert_array_equal(*weights)  # learnt with the member that has not seen the validation targets
    with pytest.raises(UserError, match=r"task\.ensemble\.served\.sasrec is a run of task\.kind=neighbours"):
        rec_dist.train(
            {**_ensemble(folder, runs, served={"sasrec": str(everything.path)}), "train": {"run_dir": str(tmp_path / "x")}}
        )


def test_members_that_cannot_serve_are_told(members, tmp_path: Path):
    folder, runs = members
    run_dir = tmp_path / "none"

    def fails(runs: dict[str, str], match: str) -> None:
        with pytest.raises(UserError, match=match):
            rec_dist.train({**_ensemble(folder, runs), "train": {"run_dir": str(run_dir)}})
        assert not run_dir.exists()

    fails({}, "task.ensemble.members is empty")
    fails({"lost": str(tmp_path / "nowhere")}, r"task\.ensemble\.members\.lost .*is no run directory")
    with pytest.raises(UserError, match=r"task\.ensemble\.rerank \(5\) has no effect"):
        rec_dist.train({**_ensemble(folder, runs, rerank=5), "train": {"run_dir": str(run_dir)}})
    fails({"a b": runs["sasrec"]}, "give it another")
    fails({**runs, "seen": runs["sasrec"]}, "task.ensemble.members.seen")
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.csv").write_text("user,item,timestamp\n" + "".join(f"u{u},x{i},{i}\n" for u in range(9) for i in range(8)))
    from rec_dist.config.schema import DataConfig
    from rec_dist.data.prepare.prepare import prepare

    prepare(DataConfig(source=str(other / "rows.csv"), path=str(other / "data"), split="leave_one_out", min_user_interactions=1))
    stranger = _member(other, "stranger", "neighbours")
    fails({"stranger": stranger}, "another data set")


def test_another_served_member_is_another_model(members, tmp_path: Path):
    """The learnt weights are the same, so the ensemble's own file is too; its fingerprint is not."""
    folder, runs = members
    prints = []
    for name, decay in (("a", 0.5), ("b", 0.9)):
        value = small_config(folder, cycle=23).model_dump(exclude_unset=True)
        task = {"kind": "neighbours", "neighbours": {"splits": ["train", "valid"], "decay": decay}}
        run_dir = {"run_dir": str(tmp_path / f"served-{name}")}
        served = rec_dist.train({**value, "task": task, "train": run_dir, "cluster": {"launcher": "local"}})
        keys = {**_ensemble(folder, runs, served={"neighbours": str(served.path)}), "train": {"run_dir": str(tmp_path / name)}}
        run = rec_dist.train(keys)
        prints.append(method_of(run.config).ranker.weights(run.config, run.model_path).fingerprints())
    assert prints[0]["model"] == prints[1]["model"]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("number", [-5, 0, 1, 24])
def test_too_few_or_too_many_candidates_name_the_key(members, tmp_path: Path, number: int):
    folder, runs = members
    with pytest.raises(UserError, match=r"task\.ensemble\.num_candidates"):
        rec_dist.train({**_ensemble(folder, runs, num_candidates=number), "train": {"run_dir": str(tmp_path / "x")}})


def test_verify_reads_the_members_too(members, tmp_path: Path):
    folder, runs = members
    run = rec_dist.train({**_ensemble(folder, runs), "train": {"run_dir": str(tmp_path / "whole")}})
    verify(str(run.path))
    path = run.model_path / "members/sasrec/model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model/members/sasrec/model/model\.safetensors has changed"):
        verify(str(run.path))


@pytest.mark.parametrize("lost", ["neighbours", "neighbours/config.yaml", "neighbours/model", "neighbours/model/files.json"])
def test_verify_misses_a_member_that_is_gone(members, tmp_path: Path, lost: str):
    import shutil

    folder, runs = members
    run = rec_dist.train({**_ensemble(folder, runs), "train": {"run_dir": str(tmp_path / "whole")}})
    path = run.model_path / "members" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"model/members/neighbours/[a-z./]+ is missing"):
        verify(str(run.path))
