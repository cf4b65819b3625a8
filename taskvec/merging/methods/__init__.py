"""The merge methods, one per module, and what they share."""
