"""On what does a run take place? Devices, processes, signals, compilers, failures of the machine, provenance."""
