"""What do features look like, in numbers? Accumulated metrics, spectra, factor sweeps, subspaces."""
