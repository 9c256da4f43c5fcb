"""How is a network trained? The loop, its step, its optimiser, its gates and its untrained control."""
