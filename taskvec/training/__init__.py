"""Training sparse task vectors. Imports torch and transformers, so nothing imports it before it is needed."""
