"""From parsed arguments to the function of a command, and from what that returns to an exit code.

Each command imports its own: a run's report draws with matplotlib, and `status` reads files only.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rec_dist.errors import UserError
from rec_dist.runtime.messages import say
from rec_dist.storage.uri import shown

_FOUND = 1  # the exit code of an audit that found a fault


def dispatch(parsed: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    return _COMMANDS[parsed.command](parsed)


def _local(path: str, key: str) -> Path:
    """Where a command writes. pathlib would make a folder `s3:` of a URI."""
    if "://" in path:
        raise UserError(f"{key} ({shown(path)}) is a URI; give a path on this machine, and copy it from there")
    return Path(path)


def _profile(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.profile import profile
    from rec_dist.config.load import load_config

    against = Path(parsed.against) if parsed.against is not None else None
    return profile(load_config(Path(parsed.target), parsed.overrides), against=against, tolerance=parsed.tolerance)


def _plan(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.plan import plan
    from rec_dist.config.load import load_config

    output = _local(parsed.json, "--json") if parsed.json is not None else None
    return plan(load_config(Path(parsed.target), parsed.overrides), output=output)


def _verify(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.verify import verify

    verify(parsed.target, cache=None if parsed.cache_dir is None else str(_local(parsed.cache_dir, "--cache-dir")))
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
    from rec_dist.commands.card_facts import Publication
    from rec_dist.commands.export import export

    publication = Publication(parsed.license, parsed.data_license, parsed.push, parsed.public)
    export(Path(parsed.target), _local(parsed.out, "--out"), parsed.overrides, kind=parsed.format, publication=publication)
    return 0


def _distil(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.distil import DistilOptions, distil
    from rec_dist.commands.distil_table import distil_table

    target, options = Path(parsed.target), DistilOptions(parsed.top_k, parsed.max_targets, parsed.compare)
    student = distil(target, parsed.into, parsed.overrides, options=options)
    if options.compare:
        say(distil_table(target, student))
    return 0


def _embed(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.embed import embed

    embed(Path(parsed.target), _local(parsed.output, "FOLDER"), parsed.overrides)
    return 0


def _recipes(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.recipes import list_recipes

    list_recipes()
    return 0


def _init(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.init import init

    path = init(parsed.target, Path(parsed.output) if parsed.output is not None else None)
    say(f"wrote {path}", sys.stderr)
    return 0


def _export_rows(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.export_rows import export_rows
    from rec_dist.config.load import load_config

    export_rows(load_config(Path(parsed.target), parsed.overrides), _local(parsed.out, "--out").absolute())
    return 0


def _rank(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.rank import rank
    from rec_dist.commands.rank_request import RankOptions
    from rec_dist.data.artifacts.recommendations import write_lines

    files = {name: getattr(parsed, name) for name in ("histories", "allow", "deny", "candidates", "items")}
    options = RankOptions(
        split=parsed.split,
        top_k=parsed.top_k,
        exclude_seen=parsed.exclude_seen,
        max_catalogue=parsed.max_catalogue,
        search=parsed.search,
        score=parsed.score,
        beam=parsed.beam,
        max_rows=parsed.max_rows,
        launcher=parsed.launcher,
        **{name: None if file is None else _local(file, f"--{name}") for name, file in files.items()},
    )
    output = None if parsed.out is None else _local(parsed.out, "--out").absolute()
    rank(
        Path(parsed.target), parsed.overrides, options=options, output=output, write=lambda batch: write_lines(batch, sys.stdout)
    )
    return 0


def _serve(parsed: argparse.Namespace) -> int:
    try:
        from rec_dist.commands.serve import ServeOptions, serve
    except ModuleNotFoundError as fault:
        if str(fault.name).partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(
            f"rec-dist serve needs the package {fault.name}, which is not installed; pip install 'rec-dist[serve]'"
        ) from fault
    token_file = None if parsed.token_file is None else _local(parsed.token_file, "--token-file")
    options = ServeOptions(parsed.host, parsed.port, parsed.queue, parsed.deadline, token_file, parsed.prompt_cache_mib)
    return serve(Path(parsed.target), parsed.overrides, options)


def _audit(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.audit import audit

    page = None if parsed.html is None else _local(parsed.html, "--html").absolute()
    done = audit(parsed.target, parsed.overrides, skip=parsed.skip, page=page)
    say(str(done))
    return 0 if done.clean else _FOUND


def _run(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.run import run_pipeline

    return run_pipeline(Path(parsed.target), parsed.overrides)


def _prepare(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.prepare import prepare
    from rec_dist.config.load import load_config

    prepare(load_config(Path(parsed.target), parsed.overrides))
    return 0


def _train(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.train import train
    from rec_dist.config.load import load_config

    train(load_config(Path(parsed.target), parsed.overrides))
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.evaluate import evaluate, table_of

    say(table_of(evaluate(Path(parsed.target), parsed.overrides)))
    return 0


def _status(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.status import status

    say("\n".join(status(parsed.target)))
    return 0


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "distil": _distil,
    "run": _run,
    "status": _status,
    "profile": _profile,
    "plan": _plan,
    "verify": _verify,
    "submit": _submit,
    "export": _export,
    "embed": _embed,
    "export-rows": _export_rows,
    "recipes": _recipes,
    "init": _init,
    "rank": _rank,
    "serve": _serve,
    "audit": _audit,
}
