"""Settings, the model catalog and the Celery application settings. Imports nothing of the other packages."""
