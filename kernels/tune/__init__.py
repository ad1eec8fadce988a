"""Tools: measuring launch configurations (`fastseg tune`), compiling for GPUs that are not here."""
