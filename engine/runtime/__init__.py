"""What does a run use of the machine? Devices, processes, signals, compilers, failures of the machine, provenance."""
