"""What a run starts from: a model folder, and what an earlier run trained for it."""

from dataclasses import dataclass, replace
from pathlib import Path

from rec_dist.data.artifacts.embeddings import EMBEDDED_NAME
from rec_dist.data.artifacts.teacher import TEACHER_NAME
from rec_dist.errors import TRAIN_AGAIN, UserError
from rec_dist.methods.delrec.config import RANDOM_TEACHER
from rec_dist.methods.language_model.saved_model import BASE_NAME
from rec_dist.methods.sequential.saved_model import SHAPE_NAME
from rec_dist.models.hub import on_this_node, weight_shapes
from rec_dist.models.language import ADAPTER_WEIGHTS
from rec_dist.models.soft_prompt import SOFT_PROMPT_NAME
from rec_dist.storage.checksums import CHECKSUMS_NAME, verify_checksums
from rec_dist.storage.files import read_object, sampled_fingerprint, sha256


@dataclass(frozen=True)
class InitialWeights:
    """Folders: the model, the adapter and soft prompts that an earlier run trained, a teacher's output, item embeddings.

    None where a run needs none. members: names and model folders of further runs that it reads, such as an ensemble's members.
    """

    model: Path
    adapter: Path | None = None
    soft_prompt: Path | None = None
    teacher: Path | None = None
    embeddings: Path | None = None
    members: tuple[tuple[str, Path], ...] = ()

    def fingerprints(self) -> dict[str, str | None]:
        """A sampled hash of the weights in each folder. model and adapter always have a key, the others only if they are set."""
        folders = {"model": self.model if self.model.name else None, "adapter": self.adapter}
        if self.soft_prompt is not None:
            folders["soft_prompt"] = self.soft_prompt
        prints = {name: sampled_fingerprint(folder, "*.safetensors") if folder else None for name, folder in folders.items()}
        if self.teacher is not None:
            prints["teacher"] = sha256(self.teacher / TEACHER_NAME)
        if self.embeddings is not None:
            prints["embeddings"] = sha256(self.embeddings / EMBEDDED_NAME)
        for name, folder in self.members:
            sums = folder / CHECKSUMS_NAME  # of all files: some members keep weights in their settings
            prints[f"member {name}"] = sha256(sums) if sums.is_file() else sampled_fingerprint(folder, "*.safetensors")
        return prints

    def on_this_node(self, *, code: bool) -> "InitialWeights":
        """The same, with a model of the Hub in this node's cache. Call it in each worker, before the model is read.

        code: model.trust_remote_code.
        """
        return replace(self, model=on_this_node(self.model, code=code))

    def check_model(self) -> None:
        """Raises UserError if a run wrote the model and a file has changed since. base_of() checks adapters and soft prompts.

        Takes a second a GB, so only the driver calls this, once, before the weights are read.
        """
        if self.model.name:
            verify_checksums(self.model)


def resolve_initial_weights(model_path: Path, init_from: Path | None, *, adapter_kind: str) -> InitialWeights:
    """model_path, or what the finished run `init_from` left: its adapter trains on, over its base model.

    Raises UserError if that run has no model, a damaged one, or one that does not go with adapter.kind.
    """
    start = _found(model_path, init_from, adapter_kind=adapter_kind)
    start.check_model()
    return start


def _found(model_path: Path, init_from: Path | None, *, adapter_kind: str) -> InitialWeights:
    if init_from is None:
        return InitialWeights(model_path)
    saved = init_from / "model"
    soft_prompt = saved if (saved / SOFT_PROMPT_NAME).is_file() else None
    if (saved / ADAPTER_WEIGHTS).is_file():
        if adapter_kind != "lora":
            raise UserError(
                f"train.init_from ({init_from}) holds an adapter and adapter.kind is {adapter_kind}; set adapter.kind=lora"
            )
        return InitialWeights(base_of(saved, model_path), saved, soft_prompt)
    if soft_prompt is not None:
        if adapter_kind == "none":
            raise UserError(
                f"train.init_from ({init_from}) holds soft prompts and adapter.kind is none; set adapter.kind=lora, under which "
                "they stay as they are"
            )
        return InitialWeights(base_of(saved, model_path), None, soft_prompt)
    if (saved / "config.json").is_file():
        return InitialWeights(saved)
    if (saved / SHAPE_NAME).is_file():
        raise UserError(f"train.init_from ({init_from}) holds a recommender; name the run of a language model")
    raise UserError(f"train.init_from ({init_from}) holds no finished model; let that run finish first")


def trained(saved: Path, model_path: Path) -> InitialWeights:
    """The base model with the adapter and soft prompts in `saved`. Raises UserError as base_of()."""
    adapter, soft_prompt = (saved if (saved / name).is_file() else None for name in (ADAPTER_WEIGHTS, SOFT_PROMPT_NAME))
    return InitialWeights(base_of(saved, model_path), adapter, soft_prompt)


def find_teacher(run_dir: str | None, *, kind: str, key: str, may_be_random: bool) -> Path | None:
    """The model folder of the recommender trained in `run_dir`, or None for `random`.

    kind, key: task.kind and the key that names the run, for the message. Raises UserError if there is no such recommender.
    """
    if run_dir == RANDOM_TEACHER and may_be_random:
        return None
    if run_dir is None:
        other = ", or random" if may_be_random else ""
        raise UserError(
            f"task.kind={kind} needs {key}: the run directory of a recommender trained with task.sequential.top_h{other}"
        )
    folder = Path(run_dir) / "model"
    if not (folder / TEACHER_NAME).is_file():
        raise UserError(
            f"{key} ({run_dir}) has no {TEACHER_NAME} in model/; train it to the end with task.sequential.top_h above 0"
        )
    return folder


def base_of(saved: Path, model_path: Path) -> Path:
    """The model that a saved adapter or soft prompt belongs to: model_path, or the folder it was trained on.

    Raises UserError if neither holds that model, or if a file in `saved` is damaged.
    """
    verify_checksums(saved)
    base = read_object(saved / BASE_NAME, TRAIN_AGAIN)
    _check_readable(saved)
    for folder in (model_path, Path(base["path"])):
        if folder.is_dir() and sampled_fingerprint(folder, "*.safetensors") == base["fingerprint"]:
            return folder
    raise UserError(
        f"the adapter in {saved} belongs to another model ({base['path']}) than model.path ({model_path}); name that one"
    )


def _check_readable(saved: Path) -> None:
    """Raises UserError if a file is cut short. Checked before workers start, so that a refused run leaves nothing behind."""
    for path in (saved / ADAPTER_WEIGHTS, saved / SOFT_PROMPT_NAME):
        if path.is_file():
            weight_shapes(path, TRAIN_AGAIN)
    if (saved / ADAPTER_WEIGHTS).is_file():
        read_object(saved / "adapter_config.json", TRAIN_AGAIN)
