"""Predicted cost: roofline, learned estimators, link models."""
