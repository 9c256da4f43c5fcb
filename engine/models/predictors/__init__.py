"""Predictors: from the aggregate and the last action, [B, T + P], to the target, [B, E]."""
