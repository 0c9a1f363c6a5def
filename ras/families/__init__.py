"""What is known of model families, as data.

Every transformer can be run by plans of dense and skipped steps. Partial steps need to know where
tokens come in, attend and go out, which is what a record (`ras.family.Family`) says.
"""

from __future__ import annotations

from ..family import Family
from . import images, packed, videos, whole

FAMILIES = (*packed.RECORDS, *images.RECORDS, *videos.RECORDS, *whole.RECORDS)
OF_REGIONS = "every token's noise"  # held against the oracle's


def family_of(transformer: object, *records: Family) -> Family:
    """The record of a transformer, of `records` first; of whole steps alone if there is none."""
    names = [base.__name__ for base in type(transformer).__mro__]
    known = (*records, *FAMILIES)
    found = (family for name in names for family in known if family.model == name)
    return next(found, Family(type(transformer).__name__))


def support() -> list[dict[str, str]]:
    """The support table, a row for each record.

    Dense steps are exact wherever there are any, and so is a run at a speed-up of 1.
    """
    return [
        {
            "transformer": family.model,
            "pipelines": ", ".join(family.pipelines),
            "skipped steps": "yes" if family.skips else "no",
            "partial steps": "yes" if family.regions else "no",
            "context parallelism": _of_ranks(family),
            "references": _of_references(family),
            "masks": "yes" if family.regions else "no",
            "result": "approximate" if family.skips else "exact",
            "tested": family.tested or OF_REGIONS if family.regions else "every call's output",
            "note": family.note,
        }
        for family in FAMILIES
    ]


def _of_ranks(family: Family) -> str:
    return "partial steps" if family.parallel else "whole steps"


def _of_references(family: Family) -> str:
    if not family.references:
        return "–"
    return "kept" if family.regions else "computed"
