"""One thread: the models are tiny, and thread pools that wait for each other cost more than they bring."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
