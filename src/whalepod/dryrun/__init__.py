"""The real training and serving steps at true size, on fake tensors and fake process groups, counted."""
