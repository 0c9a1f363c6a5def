"""`ras models`: what is supported."""

from __future__ import annotations

import argparse

from ..families import support


def main(options: argparse.Namespace) -> None:
    """Print the support table in Markdown."""
    rows = support()
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
