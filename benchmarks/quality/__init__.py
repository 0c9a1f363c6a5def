"""How near images come to the dense ones, and in what time: the ruler and its measures."""
