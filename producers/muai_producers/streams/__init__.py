"""Text as it comes: what workers write of a running request, and what readers make of it."""
