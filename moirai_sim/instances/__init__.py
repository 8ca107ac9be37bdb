"""Published placement instances, read as they are, and generated ones."""
