"""Pictures of runs: which regions were computed, what is planned, and how two images differ.

with ras.pictures.animated(pipe, "walk.gif"):  # which regions each step computes
    image = pipe("a lighthouse in a storm").images[0]
stats = ras.stats(pipe)
ras.pictures.region_map(image, stats.region_counts[0])  # how often each was computed
ras.pictures.plan_strip(stats.plan)
"""

from .film import animated
from .maps import difference_map, heat_map, psnr, region_map
from .strip import plan_strip

__all__ = ["animated", "difference_map", "heat_map", "plan_strip", "psnr", "region_map"]
