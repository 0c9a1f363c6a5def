"""Prompts to draw, and what is in a folder of their images."""

import json

from ras import many

PROMPTS = ["a red ring", "a green star", "a blue square", "a yellow ring", "a red star"]


def processes(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != many.LOCK)
