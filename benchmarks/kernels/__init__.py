"""The kernels' measurements: their times on a GPU, and their machine code without one."""
