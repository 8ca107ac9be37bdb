"""Conformance kits for third parties: one line of pytest checks a policy or a cost model."""
