"""How many GPUs, which, how laid out: memory, time, cost and search, by formula. No torch."""
