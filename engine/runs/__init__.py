"""What stands on the disk of a run? Its folder, checkpoints, state and metrics."""
