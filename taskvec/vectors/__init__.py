"""Task vectors: creation, reading, arithmetic, and comparison by position."""
