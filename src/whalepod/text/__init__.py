"""Text in and out: documents from files, tokenisers. Training and serving share it; no torch."""
