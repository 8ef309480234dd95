"""Training: the loop, its data, optimiser schedule, balancing, metrics and checkpoints."""
