"""What is drawn? Curves of a run, frozen probes, subspaces."""
