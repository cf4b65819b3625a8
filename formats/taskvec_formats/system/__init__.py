"""What the format needs of the operating system: atomic writes, locks, threads and worker processes."""
