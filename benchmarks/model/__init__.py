"""The drawn scenes, and the small models that are trained on them."""
