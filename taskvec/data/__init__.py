"""Training and evaluation data: files, examples, rows of tokens."""
