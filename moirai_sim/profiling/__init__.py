"""Measured cost: profilers of operators and links, and readers of published measurements."""
