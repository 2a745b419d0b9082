"""`rec-dist rank --launcher ray` in blocks that take as long as a test needs, as code for `python -c`."""

# The command with blocks and parts of 4 users, each of which takes a worker the seconds in sys.argv[1] and its work.
RANK_SLOWLY = """
import sys
from contextlib import contextmanager
from functools import partial
from rec_dist.cli import main
from rec_dist.launch import rank_on_ray
from rec_dist.ranking import rank, unfinished
rank.MOST_USERS = 4
unfinished._SECONDS = 0.0  # a part for each block
seconds, ranked_on_ray = float(sys.argv[1]), rank_on_ray.ranked_on_ray
@contextmanager
def slowed(load, device):
    import time
    with load(device) as rank_one:
        yield lambda block: (time.sleep(seconds), rank_one(block))[1]
rank_on_ray.ranked_on_ray = lambda load, *more: ranked_on_ray(partial(slowed, load), *more)
sys.exit(main(sys.argv[2:]))
"""
