"""Block two optional libraries in the processes that tests start.

If they are installed, MMEngine and MMDetection import them for optimisers and detectors that no such test uses. The
import takes more than two seconds in every process.
"""

import sys

sys.modules.update(transformers=None, seaborn=None)
