"""Held-out metrics of models and vectors."""
