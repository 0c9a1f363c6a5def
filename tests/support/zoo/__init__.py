"""Tiny real pipelines of diffusers, for tests of what watches a transformer and a scheduler.

`ENTRIES` has them by name, and `REFUSED` those with nothing to watch. Weights and noise are
seeded, so that each call of a pipeline gives the same latents; text encoders are left out.
"""

from support.zoo.flux import FLUXES
from support.zoo.images import IMAGES
from support.zoo.packed import PACKED
from support.zoo.parts import Entry
from support.zoo.refused import REFUSED
from support.zoo.sounds import SOUNDS
from support.zoo.videos import VIDEOS

ENTRIES = FLUXES | PACKED | IMAGES | VIDEOS | SOUNDS

__all__ = ["ENTRIES", "REFUSED", "Entry"]
