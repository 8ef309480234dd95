"""How numbers are stored and multiplied; applied to a model from outside."""
