"""Commands that run workers and whole installations."""
