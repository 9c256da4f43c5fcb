"""Trains and evaluates: config, model, targets, objectives, probes, gates, checkpoints, tracking."""
