"""Alerts: what is told of them, and where they are kept. Control workers raise them; everybody may read."""
