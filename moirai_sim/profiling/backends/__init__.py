"""What runs operators when they are timed and when a placement is measured, one module a backend."""
