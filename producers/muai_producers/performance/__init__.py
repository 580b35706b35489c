"""How the fleet performs: recorded by every process, merged in the state store, asked for over any window."""
