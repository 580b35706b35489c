"""Finding good settings: the automatic tuner, and sweeps by hand."""
