"""Task vectors: made, read, added, compared position by position."""
