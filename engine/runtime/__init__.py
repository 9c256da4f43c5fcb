"""Where and on what does a run run? Devices, processes, signals, compilers, failures of the machine, provenance."""
