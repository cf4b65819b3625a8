"""What vectors hold, and where they overlap: numbers and plots."""
