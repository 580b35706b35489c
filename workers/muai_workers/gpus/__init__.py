"""Several GPUs: what is known of them, which of them are well, and what becomes of the workers of the others."""
