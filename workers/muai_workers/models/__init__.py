"""Models on disk: where they come from, what they weigh, and small ones built on the spot."""
