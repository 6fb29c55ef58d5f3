"""Settings of every test process, made before torch is loaded."""

import os

# torch's OpenMP threads spin while they wait; beside another busy process that costs ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
