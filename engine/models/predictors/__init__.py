"""What predicts the target? Networks from the aggregate and the last action, [B, T + P], to [B, E]."""
