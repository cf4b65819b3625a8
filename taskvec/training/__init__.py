"""Training of sparse task vectors. It imports torch and transformers, so it is imported only when needed."""
