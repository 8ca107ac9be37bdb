"""What runs: operators, their work, and the graphs that they form."""
