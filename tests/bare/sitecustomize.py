"""Processes that tests start are as users have them, without what tests alone need.

Where these are installed, MMEngine and MMDetection import them for optimisers and detectors that no such test has; it
takes more than two seconds, of every process.
"""

import sys

sys.modules.update(transformers=None, seaborn=None)
