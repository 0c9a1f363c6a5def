"""Drawn scenes, the training of the bundled model and the measurements made with it."""
