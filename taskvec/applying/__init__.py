"""A task vector on a checkpoint, written as a model folder."""
