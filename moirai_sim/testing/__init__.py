"""Conformance kits for third parties: one line of pytest checks a policy or a cost model."""

from moirai_sim.testing.cost_model_checks import check_cost_model
from moirai_sim.testing.policy import check_policy

__all__ = ["check_cost_model", "check_policy"]
