"""The experiments of the LoTA paper (arXiv 2406.16797), rerun, and masks compared at equal size (docs/paper.md)."""
