import os
import sys
from pathlib import Path

# lets test files share small helpers, whatever folder they lie in
sys.path.insert(0, str(Path(__file__).parent))

# workers beside each other would each start a thread a core and wait for them by spinning; torch reads this when it is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
