"""Small pipelines whose partial steps go by the seam, and what `ras` makes of them."""

import ras

from .zoo import ENTRIES

PLAN = (1, 1, 0.5, 0, 0.25, 1, 0.5, 0)


def build(name):
    return ENTRIES[name].build()


def by_ras(name, change=lambda pipe: None):
    """The latents of `ras` on a pipeline that `change` has been made to before."""
    pipe, call = build(name)
    change(pipe)
    with ras.enabled(pipe, plan=PLAN):
        latents = call(len(PLAN))
        assert ras.stats(pipe).steps_sparse == 3
    return latents
