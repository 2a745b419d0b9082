"""The command line: arguments in, exit codes out.

0 done; 1 failed, or audit found a fault; 2 a mistake of the user, in one line; 75 stopped, run it again.
"""

import argparse
import errno
import os
import select
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rec_dist import __version__
from rec_dist.commands.arguments import parse
from rec_dist.commands.interrupts import interrupts
from rec_dist.errors import (
    NotFiniteError,
    OutOfMemoryError,
    StopRequested,
    UnreachableError,
    UserError,
    WorkerFailedError,
)
from rec_dist.runtime.messages import messages_to, say, visible
from rec_dist.runtime.quiet import quieten, uncollected
from rec_dist.storage.disk import as_disk_error
from rec_dist.storage.uri import shown

EXIT_FAILED, EXIT_USER, EXIT_STOPPED = 1, 2, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    with interrupts() as noted:
        try:
            try:
                return _main(arguments)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            return EXIT_FAILED
        except (KeyboardInterrupt, Exception) as fault:
            if not noted and not isinstance(fault, KeyboardInterrupt):
                raise
            _to_stderr("interrupted; what was saved before is kept")
            return EXIT_FAILED


def _reader_is_gone() -> bool:
    """Whether nobody reads our output any more, as after `rec-dist plan ... | head`. Then the rest of it is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
    return gone


def _main(arguments: Sequence[str] | None) -> int:
    try:
        parsed = parse(arguments, __version__)
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
            "rank": _rank,
            "audit": _audit,
        }
        with uncollected() if parsed.command == "plan" else nullcontext(), messages_to(_to_stderr):
            quieten()
            return own.get(parsed.command, _run)(parsed)
    except UserError as fault:
        _to_stderr(f"error: {' '.join(visible(str(fault)).split())}")
        return EXIT_USER
    except StopRequested as request:
        _to_stderr(str(request))
        return EXIT_STOPPED
    except (OutOfMemoryError, NotFiniteError, UnreachableError, WorkerFailedError) as fault:
        _to_stderr(f"failed: {fault}")
        return EXIT_FAILED
    except Exception as fault:
        if isinstance(fault, OSError) and fault.errno == errno.ENAMETOOLONG:
            _to_stderr(f"error: the path {str(fault.filename)[:200]}... is too long; give a shorter one")
            return EXIT_USER
        disk = as_disk_error(fault)
        if disk is None:
            raise
        _to_stderr(f"failed: {disk}")
        return EXIT_FAILED


def _local(path: str, key: str) -> Path:
    """Where a command writes. pathlib would make a folder `s3:` of a URI."""
    if "://" in path:
        raise UserError(f"{key} ({shown(path)}) is a URI; give a path on this machine, and copy it from there")
    return Path(path)


def _to_stderr(line: str) -> None:
    say(line, sys.stderr)


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
    from rec_dist.commands.export import Publication, export

    publication = Publication(parsed.license, parsed.data_license, parsed.push, parsed.public)
    export(Path(parsed.target), _local(parsed.out, "--out"), kind=parsed.format, publication=publication)
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
    _to_stderr(f"wrote {path}")
    return 0


def _export_rows(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.export_rows import export_rows
    from rec_dist.config.load import load_config

    export_rows(load_config(Path(parsed.target), parsed.overrides), _local(parsed.out, "--out").absolute())
    return 0


def _rank(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.rank import RankOptions, rank
    from rec_dist.data.artifacts.recommendations import write_lines

    files = {name: getattr(parsed, name) for name in ("histories", "allow", "deny", "candidates")}
    options = RankOptions(
        split=parsed.split,
        top_k=parsed.top_k,
        exclude_seen=parsed.exclude_seen,
        max_catalogue=parsed.max_catalogue,
        **{name: None if file is None else _local(file, f"--{name}") for name, file in files.items()},
    )
    output = None if parsed.out is None else _local(parsed.out, "--out").absolute()
    rank(
        Path(parsed.target), parsed.overrides, options=options, output=output, write=lambda batch: write_lines(batch, sys.stdout)
    )
    return 0


def _audit(parsed: argparse.Namespace) -> int:
    from rec_dist.commands.audit import audit

    page = None if parsed.html is None else _local(parsed.html, "--html").absolute()
    done = audit(parsed.target, parsed.overrides, skip=parsed.skip, page=page)
    say(str(done))
    return 0 if done.clean else EXIT_FAILED


def _run(parsed: argparse.Namespace) -> int:
    """Each command imports its own: a run's report draws with matplotlib, and `status` reads files only."""
    from rec_dist.config.load import load_config

    command, target, overrides = parsed.command, Path(parsed.target), getattr(parsed, "overrides", [])
    if command == "run":
        from rec_dist.commands.run import run_pipeline

        return run_pipeline(target, overrides)
    if command == "prepare":
        from rec_dist.commands.prepare import prepare

        prepare(load_config(target, overrides))
    elif command == "train":
        from rec_dist.commands.train import train

        train(load_config(target, overrides))
    elif command == "evaluate":
        from rec_dist.commands.evaluate import evaluate, table_of

        say(table_of(evaluate(target, overrides)))
    else:
        from rec_dist.commands.status import status

        say("\n".join(status(parsed.target)))
    return 0
