"""Where checkpoints meet torch modules: loading, placement, sparse training, live application."""
