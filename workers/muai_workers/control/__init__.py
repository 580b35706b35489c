"""What runs on a schedule: keeping house, later watching and tuning."""
