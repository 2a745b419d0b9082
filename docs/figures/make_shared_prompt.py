"""Draws shared-prompt.svg, the README's figure: one prompt with four completions, written out and shared.

Run from the root of a checkout: python docs/figures/make_shared_prompt.py. The output depends on nothing else. Colours follow the
reader's light or dark mode.
"""

import sys
from pathlib import Path

PROMPT = "A user chose these films: Alien, Aliens, Heat,"
COMPLETIONS = [("chosen", "Blade Runner"), ("rejected", "Toy Story"), ("rejected", "Casablanca"), ("rejected", "Jaws")]
WIDTH, BAR, GAP = 760, 26, 8  # pixels
PROMPT_WIDTH, TITLE_WIDTH, LEFT, BRANCH_GAP = 350, 120, 16, 60
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 14px; } .note { fill: #59636e; } .on { fill: #ffffff; }
.prompt { fill: #4c6ef5; } .chosen { fill: #2b8a3e; } .rejected { fill: #868e96; } .link { stroke: #868e96; fill: none; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .note { fill: #9198a1; } .on { fill: #ffffff; } }
"""


def bar(kind: str, x: int, y: int, width: int, label: str) -> str:
    """A bar of tokens with its label inside."""
    box = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BAR}" rx="4"/>'
    return f'{box}<text class="on" x="{x + 10}" y="{y + 18}">{label}</text>'


def text(kind: str, x: int, y: int, words: str) -> str:
    """A line of text; y is its baseline."""
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def figure() -> str:
    """The whole figure as SVG."""
    parts, y = [text("title", LEFT, 22, "Written out: the prompt once for each completion, N (P + C) tokens")], 34
    for kind, title in COMPLETIONS:
        parts += [bar("prompt", LEFT, y, PROMPT_WIDTH, PROMPT), bar(kind, LEFT + PROMPT_WIDTH + 2, y, TITLE_WIDTH, title)]
        y += BAR + GAP
    parts.append(text("note", LEFT + PROMPT_WIDTH + TITLE_WIDTH + 20, 34 + 2 * BAR + GAP, "8,352 tokens at P = 512,"))
    parts.append(text("note", LEFT + PROMPT_WIDTH + TITLE_WIDTH + 20, 52 + 2 * BAR + GAP, "C = 10, N = 16"))
    y += 22
    parts.append(text("title", LEFT, y, "Shared: the prompt once, completions at its branch point, P + N (C - 1) rows"))
    y += 12
    parts.append(bar("prompt", LEFT, y, PROMPT_WIDTH, PROMPT))
    start, top = LEFT + PROMPT_WIDTH, y
    for number, (kind, title) in enumerate(COMPLETIONS):
        row = top + number * (BAR + GAP)
        end, middle = start + BRANCH_GAP, row + BAR // 2
        curve = f"M {start} {top + BAR // 2} C {start + 35} {top + BAR // 2}, {end - 35} {middle}, {end} {middle}"
        parts += [f'<path class="link" d="{curve}"/>', bar(kind, end, row, TITLE_WIDTH, title)]
    parts.append(text("note", start + BRANCH_GAP + TITLE_WIDTH + 18, top + 2 * BAR, "656 rows"))
    parts.append(text("note", LEFT, top + 2 * BAR + 8, "No completion sees another one: each is scored as"))
    parts.append(text("note", LEFT, top + 2 * BAR + 26, "if it alone followed the prompt."))
    height = top + len(COMPLETIONS) * (BAR + GAP) + 8
    label = "One prompt with four completions: written out four times, and shared"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("shared-prompt.svg")
    target.write_text(figure(), encoding="utf-8")
