"""All that needs a GPU, part by part, and the tables that come of it."""
