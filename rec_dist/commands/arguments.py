"""The arguments of every command. Imports no command, so that `rec-dist --help` is fast."""

import argparse
from collections.abc import Sequence

from rec_dist.errors import UserError

_COMMANDS = {  # what it works on, what it does
    "prepare": ("CONFIG", "raw files -> prepared data set"),
    "train": ("CONFIG", "one task -> run directory (resumes if it exists)"),
    "evaluate": ("RUN_DIR or CONFIG", "a run directory, or the base model of a CONFIG, on a split -> metrics"),
    "rank": ("RUN_DIR or CONFIG", "the best items for each user, with a run, a base model or popularity -> a table"),
    "serve": ("RUN_DIR or CONFIG", "a run, a base model or popularity behind HTTP: lists, scores and a page to try them"),
    "distil": ("RUN_DIR", "a finished run of any kind teaches a sequential recommender -> run directory (resumes if it exists)"),
    "run": ("CONFIG", "a pipeline of stages from one file -> table and report"),
    "profile": ("CONFIG", "throughput of the real config, in a folder of its own"),
    "plan": ("CONFIG", "memory, time and cost on a described cluster, without running"),
    "submit": ("CONFIG", "a run to ray job, SLURM or KubeRay; --dry-run prints what would be sent"),
    "status": ("RUN_DIR or URI", "step, ETA, goodput and last error of a run, from its run directory"),
    "embed": ("RUN_DIR or CONFIG", "item titles through a run's or base model -> vectors that recommenders start from"),
    "export": ("RUN_DIR", "a finished run -> a folder to load without rec-dist, with a model card; --push sends it to the Hub"),
    "export-rows": ("CONFIG", "training data as JSON lines: prompt, chosen, rejected"),
    "recipes": ("", "the configurations that rec-dist ships, one line each"),
    "init": ("NAME", "a shipped recipe -> a file to edit"),
    "audit": (
        "DATA_DIR, URI or RUN_DIR",
        "leak and bias checks of a data set's questions or of a run -> table; exit code 1: found some",
    ),
    "verify": ("DATA_DIR, URI, RUN_DIR or FOLDER", "hashes of a data set, of a run's checkpoints and model, or of an export"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser(version: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rec-dist",
        description="Fine-tunes language models to rank items for users, on GPU clusters.",
        epilog="Exit codes: 0 done; 1 failed, or audit found a fault; 2 your mistake (one line says which); 75 stopped with a "
        "checkpoint, run it again.",
    )
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (target, meaning) in _COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        if name == "submit":
            _add_submit(command)
            continue
        if name == "recipes":
            continue
        command.add_argument("target", metavar=target.replace(" ", "_"), help="what it works on")
        if name == "export":
            _add_export(command)
        if name == "distil":
            _add_distil(command)
        if name == "embed":
            command.add_argument("output", metavar="FOLDER", help="where the vectors go; what is done there is kept")
        if name == "init":
            command.add_argument("output", metavar="FILE", nargs="?", help="the file to write (NAME.yaml); must not exist")
        if name not in ("verify", "status", "init"):
            command.add_argument(
                "overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the configuration"
            )
        if name == "export-rows":
            command.add_argument("--out", metavar="OUT.jsonl", required=True, help="the file to write; must not exist")
        if name == "audit":
            command.add_argument(
                "--skip", metavar="CHECK", action="append", default=[], help="leave this check out; repeat for more"
            )
            command.add_argument("--html", metavar="FILE", help="also write the page to this file; must not exist")
        if name == "rank":
            _add_rank(command)
        if name == "serve":
            _add_serve(command)
        if name == "profile":
            command.add_argument("--against", metavar="OLD.json", help="compare with this profile.json; exit code 1 when slower")
            command.add_argument("--tolerance", type=float, default=0.05, help="share that counts as slower (0.05)")
        if name == "verify":
            meaning = "data.cache_dir of the runs that read a data set in a store; default: this node's cache"
            command.add_argument("--cache-dir", metavar="FOLDER", help=meaning)
        if name == "plan":
            command.add_argument("--json", metavar="OUT.json", help="also write the numbers to this file; must not exist")
    return parser


def _add_submit(command: argparse.ArgumentParser) -> None:
    command.epilog = "--follow and --stop ask the cluster that RAY_API_SERVER_ADDRESS names, or submit.ray.address of a CONFIG."
    meaning = "what to send, with changes behind it"
    command.add_argument("overrides", nargs="*", default=[], metavar="CONFIG [section.key=value ...]", help=meaning)
    command.add_argument("--to", choices=("ray", "slurm", "kuberay"), help="where to")
    command.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be sent; checks the keys, sends nothing"
    )
    command.add_argument("--follow", metavar="ID", help="ray: show a job's output until it ends; its exit code is ours")
    command.add_argument("--stop", metavar="ID", help="ray: let a job save a checkpoint and stop")


def _add_export(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", metavar="FOLDER", required=True, help="where the model goes; must not exist")
    meaning = (
        "hf: as it was trained (default); peft: the adapter; merged: one plain model; vllm: the same, with a client for servers"
    )
    add("--format", choices=("hf", "peft", "merged", "vllm"), default="hf", help=meaning)
    add("--license", metavar="NAME", default="unknown", help="of these weights, for the model card, in the Hub's short names")
    add("--data-license", metavar="NAME", default="unknown", help="of the data and its titles, for the model card")
    add(
        "--push",
        metavar="ORG/NAME",
        help="also upload the folder to the Hugging Face Hub, into a new private repository or an old one",
    )
    add("--public", action="store_true", help="--push: make a new repository public")


def _add_distil(command: argparse.ArgumentParser) -> None:
    command.epilog = "Changes to the configuration are of the recommender. docs/methods/distil.md describes the keys."
    meaning = "the recommender that learns: a CONFIG of task.kind=sequential on the run's data, or `sequential` for SASRec"
    add = command.add_argument
    add("--into", metavar="CONFIG", required=True, help=meaning)
    add("--top-k", type=int, default=50, metavar="K", help="items of the teacher's list for a training target (50)")
    meaning = "the most training targets that the teacher ranks items for, the last of each user first; default: all"
    add("--max-targets", type=int, metavar="N", help=meaning)
    meaning = "evaluate both on the recommender's questions and end with their table (default)"
    add("--compare", action=argparse.BooleanOptionalAction, default=True, help=meaning)


def _add_rank(command: argparse.ArgumentParser) -> None:
    command.epilog = "Items in files are ids of the source or titles. docs/ranking.md describes the files."
    add = command.add_argument
    add("--out", metavar="FILE", help=".parquet, .arrow or .jsonl; must not exist. Without it: JSON lines on standard output")
    add("--histories", metavar="FILE", help=".jsonl, .csv or .parquet with user_id and history, in place of the run's users")
    add("--split", choices=("test", "valid"), help="the users of a split, with what precedes their target in evaluation")
    add("--top-k", type=int, default=10, metavar="K", help="items of a list (10)")
    add("--exclude-seen", action=argparse.BooleanOptionalAction, default=True, help="leave out items of the history (default)")
    add("--allow", metavar="FILE", help="recommend only these items, one a line")
    add("--deny", metavar="FILE", help="never recommend these items, one a line")
    add("--candidates", metavar="FILE", help="rank these: .jsonl, .csv or .parquet with user_id and candidates")
    add("--items", metavar="FILE", help="new items that a language model ranks too: item_id and title")
    meaning = "the most items that a language model scores for each user without --candidates (5000)"
    add("--max-catalogue", type=int, default=5000, metavar="N", help=meaning)
    meaning = "language models: score every title (all, default), or search the titles for the exact list, or with a beam"
    add("--search", choices=("all", "exact", "beam"), default="all", help=meaning)
    meaning = "language models: log-probabilities over the vocabulary, or over what titles go on with; default: as evaluate"
    add("--score", choices=("raw", "trie"), help=meaning)
    add("--beam", type=int, metavar="N", help="--search: nodes of the trie of titles that a step of the beam keeps (20)")
    add("--max-rows", type=int, metavar="N", help="--search: stop a user's search after so many rows of the model")
    meaning = "local: this process (default). ray: the workers that the section cluster describes"
    add("--launcher", choices=("local", "ray"), default="local", help=meaning)


def _add_serve(command: argparse.ArgumentParser) -> None:
    command.epilog = "The variable REC_DIST_SERVE_TOKEN sets a token too. docs/serving.md describes requests and answers."
    add = command.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1: for this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="where to listen (8000); 0: any that is free")
    add("--queue", type=int, default=256, metavar="N", help="requests that may wait; others get 429 (256)")
    add("--deadline", type=float, default=30.0, metavar="SECONDS", help="requests that take longer get 504 (30)")
    meaning = "language models: memory of each scorer for keys and values of prompts (1024 on CPUs, 0 on GPUs); 0: keep none"
    add("--prompt-cache-mib", type=int, metavar="N", help=meaning)
    add("--token-file", metavar="FILE", help="callers must send the token in this file: Authorization: Bearer TOKEN")


def parse(arguments: Sequence[str] | None, version: str) -> argparse.Namespace:
    """Parses the words. argparse takes positional words in one place only; here overrides may also follow options."""
    parsed, rest = _parser(version).parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `rec-dist {parsed.command} --help`")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed
