"""SLURM's ways of writing a time limit (sbatch's manual, --time)."""

import re

from rec_dist.errors import UserError

_WITH_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_WITHOUT = re.compile(r"(?:(\d+):(?=\d+:))?(\d+)(?::(\d+))?", re.ASCII)  # one number is minutes, two are minutes and seconds


def seconds_of(limit: str) -> int:
    """Of submit.slurm.time; 0 is no limit. Raises UserError for what is none.

    >>> [seconds_of(limit) for limit in ("45", "45:30", "1:02:03", "2-3", "2-3:04", "2-03:04:05")]
    [2700, 2730, 3723, 183600, 183840, 183845]
    """
    if found := _WITH_DAYS.fullmatch(limit):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    elif found := _WITHOUT.fullmatch(limit):
        days, (hours, minutes, seconds) = 0, (int(part or 0) for part in found.groups())
    else:
        raise UserError(
            f"submit.slurm.time ({limit}) is no time of SLURM's: MINUTES, M:S, H:M:S, DAYS-HOURS, D-H:M or D-H:M:S, such as 1-00:00:00"
        )
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
