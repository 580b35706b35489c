"""What every process counts, and the one place where a failure of monitoring ends. Imports nothing optional."""
