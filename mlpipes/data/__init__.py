"""Data: where samples come from, how they are split, and the verified snapshot that training reads."""
