"""Stands for a model that takes long to load."""

import time

time.sleep(60)
