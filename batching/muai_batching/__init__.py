"""The batch collector and the reliable Redis transport."""
