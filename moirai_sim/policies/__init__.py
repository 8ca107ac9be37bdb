"""Who goes where: one file a policy."""
