"""What the card of an export says of its run: how it was trained, on which data, and what it scored. No path is among it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.commands.model_card import UNKNOWN, CardFacts
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.errors import UnreachableError, UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import method_of
from rec_dist.models.hub import is_hub_id
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import read_object


@dataclass(frozen=True)
class Publication:
    """What the card states and where the folder goes. push: an id of the Hub, None for nowhere. public: of a new repository."""

    license: str = UNKNOWN
    data_license: str = UNKNOWN
    push: str | None = None
    public: bool = False


def facts_of(
    config: RunConfig,
    run: RunDirectory,
    initial: InitialWeights,
    publication: Publication,
    *,
    num_items: int | None,
    as_adapter: bool,
    for_servers: bool,
) -> CardFacts:
    """num_items: of the catalogue, None for a run on preference rows. as_adapter: whether the folder holds an adapter.

    for_servers: whether it holds the client for servers.
    """
    merged = initial.adapter is not None or initial.soft_prompt is not None
    whole = "a model with what was trained merged in" if merged else "a whole model"
    evaluation = read_object(run.evaluation, "evaluate the run again").get("row") if run.evaluation.is_file() else None
    base = config.model.path if is_hub_id(config.model.path) else Path(config.model.path).name
    return CardFacts(
        name=(publication.push or run.path.name).rpartition("/")[2],
        method=method_of(config).name,
        base=base,
        on_hub=is_hub_id(base),
        is_adapter=as_adapter,
        weights="a LoRA adapter" if as_adapter else whole,
        settings=settings_of(config, has_adapter=initial.adapter is not None, draws=num_items is not None),
        data=_data_facts(config),
        evaluation=evaluation,
        num_items=num_items,
        num_listed=config.prompt.num_candidates if config.prompt.candidates == "listed" else 0,
        scores_text=method_of(config).ranker.scores_text(config),
        for_servers=for_servers,
        license=publication.license,
        data_license=publication.data_license,
    )


def settings_of(config: RunConfig, *, has_adapter: bool, draws: bool) -> dict[str, Any]:
    """How the run was trained, by name. draws: whether negatives are drawn; the rows of preference data have their own."""
    train = config.train
    negatives = _num_negatives(config) if draws else 0
    return {
        "epochs": train.epochs,
        "max_steps": train.max_steps or "as many as the epochs take",
        "global_batch_size": train.global_batch_size,
        "learning rate": config.optimizer.lr,
        "adapter": f"LoRA, rank {config.adapter.rank}" if has_adapter else "none",
        **({"negatives": negatives} if negatives else {}),
        "seed": train.seed,
    }


def _num_negatives(config: RunConfig) -> int:
    """Those that the loss compares a target with, which need not be negatives.num: SFT has none."""
    try:
        return method_of(config).plan(config).num_negatives
    except UserError:  # a method that scores nothing after the prompt
        return 0


def _data_facts(config: RunConfig) -> dict[str, Any]:
    """The data set as its manifest describes it, without paths; its name alone if it is not there any more."""
    source = Path(config.data.source or config.data.path).name
    try:
        manifest = Manifest.load(config.data.path)
    except (UserError, UnreachableError):
        return {"source": source}
    counts = {name: manifest.counts[name] for name in ("users", "items", "positives") if name in manifest.counts}
    targets = {f"{name} targets": split.targets for name, split in manifest.splits.items()}
    cut = {"split": str(manifest.settings["split"])} if "split" in manifest.settings else {}
    return {"source": source, **counts, **targets, **cut, "fingerprint": manifest.fingerprint}
