"""The engines: one protocol, one module per library. No process imports an engine that it does not run."""
