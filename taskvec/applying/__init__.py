"""Application of a task vector to a checkpoint, written as a model folder."""
