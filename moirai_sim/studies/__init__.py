"""Many runs: evaluate, what-if, validate, report."""
