"""What does a run keep on disk? Its folder, checkpoints, state and metrics."""
