"""Emoji as a benchmark that anyone can repeat in an afternoon."""
