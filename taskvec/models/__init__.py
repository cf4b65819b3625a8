"""Checkpoints as torch modules: loading, placement of tensors, sparse training, application to a live model."""
