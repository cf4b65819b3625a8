"""Composition of task vectors, and expressions of task vectors."""
