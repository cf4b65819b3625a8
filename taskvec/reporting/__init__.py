"""Progress reports of long operations: callbacks, progress bars, and log lines."""
