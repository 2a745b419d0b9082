"""`rec-dist plan` from the outside: known parameter counts, the shipped clusters and configuration, mistakes, and run time."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rec_dist.cli import main
from rec_dist.config.load import load_config
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.models.architecture import count_parameters
from rec_dist.models.language import LoraSpec
from rec_dist.plan.cluster_file import load_cluster
from rec_dist.plan.inputs import hardware_of
from rec_dist.plan.report import make_plan

ROOT = Path(__file__).resolve().parents[2]
MODELS, CLUSTERS = ROOT / "configs" / "plan" / "models", ROOT / "configs" / "plan" / "clusters"
CONFIG = "llama3-8b:sdpo"
Make = Callable[..., dict[str, Any]]


PATHS = (f"plan.cluster={CLUSTERS / '8xh100.yaml'}", f"plan.model={MODELS / 'llama3-8b'}", "data.path=nowhere")


def planned(*overrides: str) -> dict[str, Any]:
    """The shipped configuration at ZeRO stage 3."""
    return make_plan(load_config(CONFIG, [*PATHS, "cluster.zero_stage=3", *overrides]))


@pytest.mark.parametrize(
    ("name", "parameters", "tied"),
    [
        ("smollm2-135m", 134_515_008, True),
        ("llama3-1b", 1_235_814_400, True),
        ("qwen2.5-7b", 7_615_616_512, False),
        ("llama3-8b", 8_030_261_248, False),
        ("llama3-70b", 70_553_706_496, False),
        ("llama3.1-405b", 405_853_388_800, False),
    ],
)
def test_parameters_are_those_that_were_published(name: str, parameters: int, tied: bool) -> None:
    found = count_parameters(MODELS / name, None)
    assert (found.total, found.trainable, found.tied) == (parameters, parameters, tied)


def test_an_adapter_is_counted_by_rank_and_modules() -> None:
    """8B: q and o are 4096 + 4096, k and v 4096 + 1024, gate, up and down 4096 + 14336, in 32 layers."""
    everywhere = count_parameters(MODELS / "llama3-8b", LoraSpec(16, 32.0, 0.0, "all-linear"))
    assert everywhere.trainable == 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432) == 41_943_040
    assert (everywhere.total, everywhere.adapted) == (8_030_261_248 + 41_943_040, 7 * 32)
    two = count_parameters(MODELS / "llama3-8b", LoraSpec(8, 32.0, 0.0, ["q_proj", "v_proj"]))
    assert two.trainable == 8 * 32 * (8192 + 5120)


def test_without_gpus_one_worker_has_the_cores_and_memory_of_a_node_and_two_share_them(tmp_path: Path, tiny_config: Make) -> None:
    changes = {"cluster.launcher": "ray", "plan": {"cluster": str(CLUSTERS / "local-cpu.yaml")}}
    one, two = (
        make_plan(RunConfig.model_validate(tiny_config(tmp_path / "run", {**changes, "cluster.num_workers": number})))
        for number in ("auto", 2)
    )
    assert (one["cluster"]["workers"], two["cluster"]["workers"]) == (1, 2)
    assert one["memory"]["device_bytes"] == 2 * two["memory"]["device_bytes"] == 16e9
    machine = load_cluster(CLUSTERS / "local-cpu.yaml")
    nodes = machine.model_copy(update={"nodes": 3, "gpus_per_node": 8})
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", changes))
    fast, slow = (hardware_of(config, nodes, workers=workers, bf16=False) for workers in (3, 6))
    assert (fast.per_node, fast.nodes, slow.per_node, slow.nodes) == (1, 3, 2, 3)
    assert fast.flops == 2 * slow.flops == 8 * machine.fp32_tflops * 1e12 * machine.achievable_fraction
    single = RunConfig.model_validate(tiny_config(tmp_path / "run", {**changes, "cluster.cpus_per_worker": 1.0}))
    assert hardware_of(single, nodes, workers=3, bf16=False).flops == fast.flops / 8


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_cluster_is_valid(path: Path) -> None:
    cluster = load_cluster(path)
    assert str(cluster.num_devices) in cluster.name


def test_the_shipped_configuration_fits_and_is_what_it_says() -> None:
    report = planned()
    assert report["memory"]["fits"]
    assert report["memory"]["total_bytes"] == pytest.approx(sum(report["memory"]["parts"].values()))
    assert report["workload"]["micro_batches_per_step"] == 1
    assert report["run"]["gpu_hours"] == pytest.approx(report["run"]["seconds"] * 8 / 3600)
    assert report["run"]["steps"] == 1000
    step = report["step"]
    assert step["seconds"] == pytest.approx(
        step["compute_seconds"] + step["gather_seconds"] + step["reduce_seconds"] - step["hidden_seconds"] + step["host_seconds"]
    )


def test_the_smallest_stage_that_fits_is_taken() -> None:
    """8B with recomputation: 24.5 GB with whole weights, so stage 2, the first that sums bfloat16 gradients in float32."""
    auto = make_plan(load_config(CONFIG, PATHS))
    assert auto["settings"]["cluster.zero_stage"] == 2
    assert [(row["stage"], row["auto"], row["fits"]) for row in auto["stages"]] == [(2, True, True), (3, False, True)]
    assert auto["memory"]["total_bytes"] == pytest.approx(auto["stages"][0]["needs_bytes"])
    assert auto["step"]["seconds"] == auto["stages"][0]["seconds"] < auto["stages"][1]["seconds"]
    sharded = planned()
    assert sharded["stages"] == auto["stages"]  # what auto would take, also where the configuration says 3
    assert sharded["memory"]["total_bytes"] == pytest.approx(auto["stages"][1]["needs_bytes"])
    assert sharded["step"]["seconds"] == pytest.approx(auto["stages"][1]["seconds"])
    large = make_plan(load_config(CONFIG, [*PATHS, f"plan.model={MODELS / 'llama3-70b'}"]))
    assert (large["settings"]["cluster.zero_stage"], large["stages"][0]["fits"]) == (3, False)
    one = make_plan(load_config(CONFIG, [*PATHS, "cluster.num_workers=1"]))
    assert [row["stage"] for row in one["stages"]] == [2]
    exact = make_plan(load_config(CONFIG, [*PATHS, "model.dtype=float32"]))
    assert (exact["settings"]["cluster.zero_stage"], [row["stage"] for row in exact["stages"]]) == (0, [0, 1, 2, 3])


def test_layers_stay_gathered_with_either_reference() -> None:
    """1B: as long as what follows a layer is below 1e9 elements, it stays for the backward pass; here all of them do.

    An online reference costs one more forward pass.
    """
    small = f"plan.model={MODELS / 'llama3-1b'}"
    cached, online = planned(small, "task.reference=cached"), planned(small, "task.reference=online")
    largest = 128_256 * 2048
    everything = 1_235_814_400 + cached["model"]["trainable"]
    assert 2 * everything < cached["memory"]["parts"]["gathered layers"] + 1e7 < 2 * (everything + largest) + 1e7
    assert online["memory"]["parts"] == cached["memory"]["parts"]
    assert online["step"]["gather_seconds"] == cached["step"]["gather_seconds"]
    assert online["step"]["seconds"] > cached["step"]["seconds"]
    assert cached["run"]["reference_seconds"] > 0 == online["run"]["reference_seconds"]
    none = planned(small, "task.kind=sft", "task.reference=online")  # a method without one, whatever the key says
    assert none["run"]["reference_seconds"] == 0


def test_a_second_copy_of_the_weights_takes_its_share() -> None:
    """hpZ within four of eight workers: a quarter of 8B in bfloat16 more."""
    plain, copied = planned(), planned("cluster.hpz_partition_size=4")
    parts = copied["memory"]["parts"]
    assert parts["hpZ copy"] == pytest.approx(2 * plain["model"]["parameters"] / 4, rel=1e-6)
    assert {name: size for name, size in parts.items() if name not in ("hpZ copy", "fragmentation")} == {
        name: size for name, size in plain["memory"]["parts"].items() if name != "fragmentation"
    }


def test_soft_prompts_before_a_frozen_model() -> None:
    """DELRec's stage 1: two prompts a group, no reference, and only 100 vectors of width 4096 train."""
    stage_1 = "delrec-llama3-8b:distill"
    paths = [*PATHS, "cluster.zero_stage=3"]
    report = make_plan(load_config(stage_1, [*paths, "task.reference=online", "model.activation_checkpointing=false"]))
    model, work, run = report["model"], report["workload"], report["run"]
    assert (model["trainable"], model["base_parameters"]) == (409_600, 8_030_261_248)
    # 50 of history, 20 listed; an example and t_1, or t_2 .. t_15
    assert work["prompt"] == 16 + 100 + (50 + 20 + (3 + 14) / 2) * 10
    assert (work["groups"], work["negatives"], work["prompts_per_group"]) == (64, 19, 2)
    assert run["reference_seconds"] == 0
    overrides = ["task.kind=delrec", "adapter.kind=lora", "model.activation_checkpointing=false"]
    behind = make_plan(load_config(stage_1, [*paths, *overrides]))
    assert behind["workload"]["prompt"] == 16 + 100 + (50 + 20) * 10
    parts, of_lora = report["memory"]["parts"], behind["memory"]["parts"]
    # of norms, the MLP's product, and between A and B of seven adapters of rank 16
    inputs_of_matrices = 2 * 4096 + 14336 + 7 * 16
    assert of_lora["activations"] - parts["activations"] == 32 * 16384 * 2 * inputs_of_matrices
    assert parts["optimizer state"] == 12 * 409_600 / 8
    one = make_plan(load_config(stage_1, [*paths, "task.delrec.objectives=temporal"]))["workload"]
    assert (one["prompt"], one["prompts_per_group"]) == (16 + 100 + (50 + 20 + 3) * 10, 1)


def test_what_does_not_fit_comes_with_changes_that_do() -> None:
    report = planned("model.activation_checkpointing=false")
    assert not report["memory"]["fits"] and report["step"]["limit"] == "memory"
    changes = report["memory"]["changes"]
    assert {key for change in changes for key in change["keys"]} >= {
        "model.activation_checkpointing",
        "train.max_tokens_per_micro_batch",
    }
    for change in changes:
        if "cluster.num_workers" in change["keys"]:
            continue
        keys = [f"{key}={str(value).lower()}" for key, value in change["keys"].items()]
        again = planned("model.activation_checkpointing=false", *keys)
        assert again["memory"]["fits"]
        assert again["memory"]["total_bytes"] == pytest.approx(change["needs_bytes"])


def test_more_nodes_hold_less_each_and_pay_for_the_network() -> None:
    one = planned("plan.model=" + str(MODELS / "llama3-70b"))
    eight = planned(
        "plan.model=" + str(MODELS / "llama3-70b"),
        f"plan.cluster={CLUSTERS / '8x8xh100.yaml'}",
        "cluster.num_workers=64",
        "train.global_batch_size=1408",
    )
    assert eight["memory"]["total_bytes"] < one["memory"]["total_bytes"]
    assert eight["step"]["gather_seconds"] > one["step"]["gather_seconds"]


def test_the_table_and_the_json(tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "config.yaml", tmp_path / "out" / "plan.json"
    cluster = f"plan.cluster={CLUSTERS / 'local-cpu.yaml'}"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", "task.kind=sdpo")), encoding="utf-8")
    assert main(["plan", str(file), cluster, "--json", str(output)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(output.read_text(encoding="utf-8"))
    assert f"{report['model']['base_parameters']:,} parameters" in printed
    assert report["run"]["steps_from"].startswith("of the data at")
    assert report["run"]["steps"] == 4
    assert sorted(path.name for path in output.parent.iterdir()) == ["plan.json"]
    assert not (tmp_path / "run").exists()


def test_steps_are_counted_from_the_data(tmp_path: Path, tiny_config: Make) -> None:
    config = tiny_config(tmp_path / "run", {"train.max_steps": None, "plan": {"cluster": str(CLUSTERS / "local-cpu.yaml")}})
    from rec_dist.data.dataset.prepared_data import PreparedData

    targets = PreparedData.open(config["data"]["path"]).split("train").num_targets
    report = make_plan(RunConfig.model_validate(config))
    assert report["run"]["steps"] == -(-2 * targets // 8)


def test_steps_of_distillation_are_those_of_its_task(tmp_path: Path, tiny_config: Make, tiny_model_dir: Path) -> None:
    """Positions with fewer than three items before them have no prompt, so they take no steps either."""
    from rec_dist.methods.initial_weights import InitialWeights
    from rec_dist.methods.registry import build_task

    words = ("task.kind=delrec_distill", "adapter.kind=soft_prompt", "prompt.num_virtual=4", "negatives.num=5")
    teacher = ("task.delrec.top_h=3", "task.delrec.teacher=random", "train.max_tokens_per_micro_batch=4096")
    changes = {"train.max_steps": None, "plan": {"cluster": str(CLUSTERS / "local-cpu.yaml")}}
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", *words, *teacher, changes))
    task = build_task(config, InitialWeights(tiny_model_dir), "cpu")
    assert make_plan(config)["run"]["steps"] == task.sampler.num_steps
    all_targets = RunConfig.model_validate(tiny_config(tmp_path / "run", changes))
    assert make_plan(all_targets)["run"]["steps"] > task.sampler.num_steps


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ("plan.cluster is not set", "8xh100")),
        (["plan.cluster=nowhere.yaml"], ("plan.cluster (nowhere.yaml)", "does not exist")),
        (["plan.cluster={cpu}", "plan.model={bare}"], ("hidden_size", "config.json")),
        (["plan.cluster={cpu}", "plan.model=nowhere"], ("plan.model (nowhere)", "llama3-8b")),
        (["plan.cluster={cpu}", "model.path=nowhere"], ("model.path (nowhere)", "set plan.model", "config.json")),
        (["plan.cluster={cpu}", "--json", "{bare}"], ("--json (", "is a folder; choose another file")),
        (["plan.cluster={cpu}", "--json", "{file}"], ("--json (", "config.yaml) exists", "choose a file that does not")),
        (["plan.cluster={broken}"], ("plan.cluster", "nodes", "gpu_per_node is no key", "gpus_per_node")),
        (["plan.cluster={cpu}", "data.path=nowhere", "train.max_steps=null"], ("data.path (nowhere)", "set train.max_steps")),
        (["plan.cluster={cpu}", "cluster.num_workers=9"], ("cluster.num_workers (9)", "1 to 2")),
        (["plan.cluster={cpu}", "cluster.hpz_partition_size=2"], ("cluster.hpz_partition_size (2)", "set cluster.zero_stage=3")),
        (
            [
                "plan.cluster=8xh100",
                "cluster.num_workers=8",
                "cluster.launcher=ray",
                "cluster.zero_stage=3",
                "cluster.hpz_partition_size=3",
            ],
            ("cluster.hpz_partition_size (3)", "does not divide the 8 worker(s)", "or to 1"),
        ),
        (["plan.cluster={cpu}", "model.attention=flex"], ("model.attention=flex", "set model.attention=auto")),
        (
            ["plan.cluster={cpu}", "train.max_tokens_per_micro_batch=16"],
            ("train.max_tokens_per_micro_batch (16)", "raise it, lower", "plan.completion_tokens"),
        ),
        (["plan.cluster={cpu}", "task.kind=sequential"], ("task.kind=sequential",)),
        (["plan.cluster={cpu}", "adapter.kind=soft_prompt"], ("adapter.kind=soft_prompt", "task.kind=delrec_distill")),
        (["plan.cluster={cpu}", "task.kind=delrec_distill"], ("adapter.kind=lora", "set adapter.kind=soft_prompt")),
        (["plan.cluster={cpu}", "plan.overlap=2"], ("plan.overlap", "less than or equal to 1")),
    ],
)
def test_mistakes_are_one_line(
    overrides: list[str], names: tuple[str, ...], tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    file, bare, broken = tmp_path / "config.yaml", tmp_path / "bare", tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path / "run")), encoding="utf-8")
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama", "vocab_size": 10}', encoding="utf-8")
    broken.write_text("name: x\ngpu_per_node: 8\n", encoding="utf-8")
    places = {"cpu": CLUSTERS / "local-cpu.yaml", "bare": bare, "broken": broken, "file": file}
    if any("{broken}" in override for override in overrides):
        names = ("broken.yaml", *names[1:])
    assert main(["plan", str(file), *(override.format(**places) for override in overrides)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1 and printed.err.startswith("error: ")
    assert [name for name in names if name not in printed.err] == []


def test_experts_are_refused(tmp_path: Path, tiny_config: Make) -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(shape | experts), encoding="utf-8")
    settings = {"cluster": str(CLUSTERS / "local-cpu.yaml"), "model": str(tmp_path)}
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", {"plan": settings, "adapter.kind": "none"}))
    with pytest.raises(UserError, match="mixture of experts"):
        make_plan(config)


def test_the_largest_model_is_planned_in_under_five_seconds() -> None:
    """Imports do not count, since other tests have paid for them: about 3 s of an idle core."""
    began = time.process_time()
    planned("plan.model=" + str(MODELS / "llama3.1-405b"))
    assert time.process_time() - began < 5


_SHAPE = json.loads((MODELS / "llama3-1b" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", value) for value in (-1, 1, 7, 1.5, "64", "x", True, [1], float("inf"), 1 << 40)),
        *(("intermediate_size", value) for value in (-1, "x", 1.5, float("nan"))),
        *(("num_hidden_layers", value) for value in ("x", -1, 1.5, 3000)),
        ("num_attention_heads", -1),
        ("num_attention_heads", 7),
        ("num_key_value_heads", "x"),
        ("num_key_value_heads", 0),
        ("head_dim", -1),
        ("vocab_size", 1.5),
        ("max_position_embeddings", "x"),
        ("rms_norm_eps", "x"),
        ("hidden_act", "nothing"),
        ("model_type", 5),
        ("text_config", 5),
    ],
)
def test_a_model_that_cannot_be_is_one_line(
    key: str, value: Any, tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(json.dumps(_SHAPE | {key: value}), tmp_path, tiny_config, capsys)


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[]", "null", '{"hidden_size": ' + "9" * 5000 + "}"])
def test_a_config_json_that_is_none_is_one_line(
    text: str, tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(text, tmp_path, tiny_config, capsys)


def refused(text: str, folder: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` of a model whose config.json is `text` ends with one line that names the file and the way out."""
    file = folder / "config.yaml"
    settings = {"cluster": str(CLUSTERS / "local-cpu.yaml"), "model": str(folder)}
    file.write_text(yaml.safe_dump(make(folder / "run", {"plan": settings})), encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert main(["plan", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}")
    assert line.endswith("give the config.json of a decoder such as Llama")


def test_every_field_of_a_cluster_file_has_bounds(tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """At the bounds there is a plan whose numbers JSON can represent; beyond them one line names the field."""
    base = yaml.safe_load((CLUSTERS / "8xh100.yaml").read_text(encoding="utf-8"))
    file, cluster = tmp_path / "config.yaml", tmp_path / "cluster.yaml"
    settings = {"plan": {"cluster": str(cluster), "model": str(MODELS / "smollm2-135m")}, "model.dtype": "auto"}
    file.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", settings)), encoding="utf-8")
    fields = [key for key, value in base.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    assert len(fields) == 12
    for field in fields:
        for value in (1e308, 1e-308, float("inf"), float("nan"), -1, 10**30):
            cluster.write_text(yaml.safe_dump(base | {field: value}), encoding="utf-8")
            output = tmp_path / f"{field}.json"
            code, printed = main(["plan", str(file), "--json", str(output)]), capsys.readouterr()
            if code == 2:
                (line,) = printed.err.splitlines()
                assert line.startswith(f"error: {cluster}: {field}: input should be ")
            else:
                assert value == 1e-308 and field in ("reserved_gb", "nvlink_latency_us", "network_latency_us"), (field, value)
                assert json.loads(output.read_text(encoding="utf-8"), parse_constant=pytest.fail)
                output.unlink()
    for end in (0, 1):
        ends = dict.fromkeys(fields, (1e-06, 1000000.0)[end]) | {"nodes": (1, 100_000)[end], "gpus_per_node": (1, 1024)[end]}
        ends |= {"achievable_fraction": (1e-6, 1.0)[end], "link_efficiency": (1e-6, 1.0)[end]}
        cluster.write_text(yaml.safe_dump(base | ends), encoding="utf-8")
        output = tmp_path / f"end-{end}.json"
        assert main(["plan", str(file), "--json", str(output), "train.global_batch_size=200000000", "train.max_steps=4"]) in (
            0,
            1,
        )
        json.loads(output.read_text(encoding="utf-8"), parse_constant=pytest.fail)
