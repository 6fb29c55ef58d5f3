"""`python -m srwm_rl` is `srwm-rl`."""

import sys

from srwm_rl.scripts.main import main

sys.exit(main())
