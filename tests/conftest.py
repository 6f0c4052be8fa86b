import sys
from pathlib import Path

# lets test files share small helpers, whatever folder they lie in
sys.path.insert(0, str(Path(__file__).parent))
