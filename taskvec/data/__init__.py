"""Training and evaluation data: files, examples and rows of tokens."""
