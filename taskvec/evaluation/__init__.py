"""Evaluation: metrics of models and task vectors on held-out examples."""
