"""A job as files that other programs take: launchers, schedulers, clusters, serving engines (`launch.py`)."""
