"""Settings that every test shares: no hub, a cache of its own, and reproducible property tests."""

import atexit
import os
import tempfile

from hypothesis import settings

# Set before anything imports transformers or datasets, which read these once; subprocesses of tests inherit them.
_cache = tempfile.TemporaryDirectory(prefix="attnpress-tests-")
atexit.register(_cache.cleanup)
os.environ["HF_HOME"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Examples are derived from the test itself, so a red run is red again; no deadline, since machines are shared.
settings.register_profile("attnpress", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("attnpress")
