"""Engine workers, control workers and the supervisor."""
