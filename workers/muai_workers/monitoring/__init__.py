"""What shows an installation to those who watch it: the metrics page, and what is sampled for it."""
