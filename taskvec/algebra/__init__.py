"""Vectors from vectors: composition, and expressions."""
