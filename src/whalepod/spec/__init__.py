"""Ground floor: facts and vocabulary. Nothing here imports torch."""
