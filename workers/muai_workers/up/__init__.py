"""A whole installation on one machine: what is started, kept running, shown and stopped."""
