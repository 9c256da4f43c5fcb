"""What predicts the target? Networks from the aggregate [B, T] and the last action [B, P] to [B, E]."""
