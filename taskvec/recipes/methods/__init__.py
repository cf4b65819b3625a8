"""Merge methods on whole models: what each computes, and the table of their names and parameters."""
