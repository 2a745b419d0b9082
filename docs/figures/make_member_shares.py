"""Draws member-shares.svg, the figure of docs/methods/quality.md: what each member of an ensemble adds, a panel a data set.

Run from the root of a checkout, with the folders of evaluated ensembles: python docs/figures/make_member_shares.py
member-shares.svg "MovieLens-1M=runs/ml-1m/ensemble" ... The drawing is that of a report (rec_dist/report/write.py).
"""

import sys
from pathlib import Path

from rec_dist.report.compare import shares_of
from rec_dist.report.write import share_bars


def main(target: str, *panels: str) -> None:
    """panels: TITLE=RUN_DIR of each."""
    shares = []
    for panel in panels:
        title, _, folder = panel.partition("=")
        shares += shares_of(title, Path(folder), ["hr@10", "ndcg@10"])
    drawing = share_bars(shares, {}).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    Path(target).write_text(drawing + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
