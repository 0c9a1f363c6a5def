"""Where a run's evaluations should fall, and on which tokens."""
