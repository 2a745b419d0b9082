"""The command line:

words in, exit codes out. 0 done; 1 failed; 2 a mistake of the user, in one line; 75 stopped, run it again.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rec_dist import __version__
from rec_dist.commands.interrupts import interrupts
from rec_dist.errors import (
    NotFiniteError,
    OutOfMemoryError,
    StopRequested,
    UnreachableError,
    UserError,
    WorkerFailedError,
)
from rec_dist.runtime.messages import messages_to
from rec_dist.runtime.quiet import quieten, uncollected
from rec_dist.storage.disk import as_disk_error

EXIT_FAILED, EXIT_USER, EXIT_STOPPED = 1, 2, 75

_COMMANDS = {  # what it works on, what it does
    "prepare": ("CONFIG.yaml", "raw files -> prepared data set"),
    "train": ("CONFIG.yaml", "one task -> run directory (resumes if it exists)"),
    "evaluate": ("RUN_DIR or CONFIG.yaml", "a run directory, or the base model of a CONFIG, on a split -> metrics"),
    "run": ("CONFIG.yaml", "a pipeline of stages from one file -> table and report"),
    "profile": ("CONFIG.yaml", "throughput of the real config, in a folder of its own"),
    "plan": ("CONFIG.yaml", "memory, time and cost on a described cluster, without running"),
    "submit": ("CONFIG.yaml", "a run to ray job, SLURM or KubeRay; --dry-run prints what would be sent"),
    "status": ("RUN_DIR or URI", "step, ETA, goodput and last error of a run, from its run directory"),
    "embed": ("RUN_DIR or CONFIG.yaml", "item titles through a run's or base model -> vectors that recommenders start from"),
    "export": ("RUN_DIR", "a finished run -> a plain model folder for servers: adapter merged, soft prompts as tokens"),
    "export-rows": ("CONFIG.yaml", "training data as JSON lines: prompt, chosen, rejected"),
    "recipes": ("", "the configurations that rec-dist ships, one line each"),
    "init": ("NAME", "a shipped recipe -> a file to edit"),
    "verify": ("DATA_DIR, URI or RUN_DIR", "hashes of a data set, or of a run's checkpoints and model"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `rec-dist --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rec-dist",
        description="Fine-tunes language models to rank items for users, on GPU clusters.",
        epilog="Exit codes: 0 done; 1 failed; 2 your mistake (one line says which); 75 stopped with a checkpoint, run it again.",
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
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
            command.add_argument("output", metavar="FOLDER", help="where the model goes; must not exist")
            command.add_argument("--format", choices=("merged",), default="merged", help="merged: one plain model (default)")
        if name == "embed":
            command.add_argument("output", metavar="FOLDER", help="where the vectors go; what is done there is kept")
        if name == "init":
            command.add_argument("output", metavar="FILE", nargs="?", help="the file to write (NAME.yaml); must not exist")
        if name not in ("export", "verify", "status", "init"):
            command.add_argument(
                "overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the configuration"
            )
        if name == "export-rows":
            command.add_argument("--out", metavar="OUT.jsonl", required=True, help="the file to write; must not exist")
        if name == "profile":
            command.add_argument("--against", metavar="OLD.json", help="compare with this profile.json; exit code 1 when slower")
            command.add_argument("--tolerance", type=float, default=0.05, help="share that counts as slower (0.05)")
        if name == "plan":
            command.add_argument("--json", metavar="OUT.json", help="also write the numbers to this file; must not exist")
    return parser


def _add_submit(command: argparse.ArgumentParser) -> None:
    command.epilog = "--follow and --stop ask the cluster that RAY_API_SERVER_ADDRESS names, or submit.ray.address of a CONFIG."
    meaning = "what to send, with changes behind it"
    command.add_argument("overrides", nargs="*", default=[], metavar="CONFIG.yaml [section.key=value ...]", help=meaning)
    command.add_argument("--to", choices=("ray", "slurm", "kuberay"), help="where to")
    command.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be sent; checks the keys, sends nothing"
    )
    command.add_argument("--follow", metavar="ID", help="ray: show a job's output until it ends; its exit code is ours")
    command.add_argument("--stop", metavar="ID", help="ray: let a job save a checkpoint and stop")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the words. argparse takes positional words in one place only; here overrides may also follow options."""
    parsed, rest = _parser().parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `rec-dist {parsed.command} --help`")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    with interrupts() as noted:
        try:
            return _main(arguments)
        except (KeyboardInterrupt, Exception) as fault:
            if not noted and not isinstance(fault, KeyboardInterrupt):
                raise
            print("interrupted; what was saved before is kept", file=sys.stderr)
            return EXIT_FAILED


def _main(arguments: Sequence[str] | None) -> int:
    try:
        parsed = _parse(arguments)
        own = {
            "profile": _profile,
            "plan": _plan,
            "verify": _verify,
            "submit": _submit,
            "export": _export,
            "embed": _embed,
            "export-rows": _export_rows,
            "recipes": _recipes,
            "init": _init,
        }
        with uncollected() if parsed.command == "plan" else nullcontext(), messages_to(_to_stderr):
            quieten()
            return own.get(parsed.command, _run)(parsed)
    except UserError as fault:
        print(f"error: {' '.join(str(fault).split())}", file=sys.stderr)
        return EXIT_USER
    except StopRequested as request:
        print(str(request), file=sys.stderr)
        return EXIT_STOPPED
    except (OutOfMemoryError, NotFiniteError, UnreachableError, WorkerFailedError) as fault:
        print(f"failed: {fault}", file=sys.stderr)
        return EXIT_FAILED
    except Exception as fault:
        disk = as_disk_error(fault)
        if disk is None:
            raise
        print(f"failed: {disk}", file=sys.stderr)
        return EXIT_FAILED


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _profile(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.profile import profile
    from rec_dist.config.load import load_config

    against = Path(parsed.against) if parsed.against is not None else None
    return profile(load_config(Path(parsed.target), parsed.overrides), against=against, tolerance=parsed.tolerance)


def _plan(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.plan import plan
    from rec_dist.config.load import load_config

    output = Path(parsed.json) if parsed.json is not None else None
    return plan(load_config(Path(parsed.target), parsed.overrides), output=output)


def _verify(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.verify import verify

    verify(parsed.target)
    return 0


def _submit(parsed: argparse.Namespace) -> int:
    from rec_dist.commands import submit

    path, overrides = Path(parsed.overrides[0]) if parsed.overrides else None, parsed.overrides[1:]
    known_job = parsed.follow or parsed.stop
    if known_job is not None:
        if parsed.to not in (None, "ray") or parsed.dry_run or None not in (parsed.follow, parsed.stop):
            raise UserError("--follow and --stop take one job of a Ray cluster and go with no other option")
        ask = submit.follow if parsed.follow is not None else submit.stop
        return ask(known_job, path, overrides)
    if path is None or parsed.to is None:
        raise UserError("submit needs a CONFIG and --to ray, slurm or kuberay; or --follow ID, --stop ID")
    return submit.submit(path, overrides, to=parsed.to, dry_run=parsed.dry_run)


def _export(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.export import export_merged

    export_merged(Path(parsed.target), Path(parsed.output))
    return 0


def _embed(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.embed import embed

    embed(Path(parsed.target), Path(parsed.output), parsed.overrides)
    return 0


def _recipes(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.recipes import list_recipes

    list_recipes()
    return 0


def _init(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.init import init

    path = init(parsed.target, Path(parsed.output) if parsed.output is not None else None)
    _to_stderr(f"wrote {path}")
    return 0


def _export_rows(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.export_rows import export_rows
    from rec_dist.config.load import load_config

    export_rows(load_config(Path(parsed.target), parsed.overrides), Path(parsed.out).absolute())
    return 0


def _run(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.evaluate import evaluate, table_of
    from rec_dist.commands.prepare import prepare
    from rec_dist.commands.run import run_pipeline
    from rec_dist.commands.status import status
    from rec_dist.commands.train import train
    from rec_dist.config.load import load_config

    command, target, overrides = parsed.command, Path(parsed.target), getattr(parsed, "overrides", [])
    if command == "run":
        return run_pipeline(target, overrides)
    if command == "prepare":
        prepare(load_config(target, overrides))
    elif command == "train":
        train(load_config(target, overrides))
    elif command == "evaluate":
        print(table_of(evaluate(target, overrides)), flush=True)
    else:
        print("\n".join(status(parsed.target)))
    return 0
