"""What carries a run, and is no idea of the paper: files, resuming, processes, flags, data sets."""
