"""The merge methods, one a module, and what they share."""
