"""What is drawn? Curves of a training, frozen probes, subspaces."""
