"""Statistics and plots of task vectors: density and overlap of their masks."""
