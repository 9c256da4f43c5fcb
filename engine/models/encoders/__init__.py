"""What sees a view by itself? Networks from views [B, N, ...] to features [B, N, D]."""
