import json
from pathlib import Path

import numpy as np

from srwm_rl.agents import IMPALA, PPO

out = {}
for n, c in (("ppo", PPO), ("impala", IMPALA)):
    m = c.load(f"zip_{n}")
    s = None
    acts = []
    rng = np.random.default_rng(0)
    for t in range(20):
        a, s = m.predict(rng.normal(size=(2, 4)).astype(np.float32), s, np.array([t == 0] * 2), deterministic=True)
        acts.append(a.tolist())
    out[n] = acts
Path("predicted.json").write_text(json.dumps(out))
print(out)
