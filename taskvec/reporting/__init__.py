"""How long work reports where it is: callbacks, progress bars, and lines in a log."""
