import numpy as np, json
from srwm_rl.agents import PPO, IMPALA
out={}
for n,c in (("ppo",PPO),("impala",IMPALA)):
    m=c.load(f"zip_{n}"); s=None; acts=[]
    rng=np.random.default_rng(0)
    for t in range(20):
        a,s=m.predict(rng.normal(size=(2,4)).astype(np.float32), s, np.array([t==0]*2), deterministic=True); acts.append(a.tolist())
    out[n]=acts
json.dump(out, open("predicted.json","w")); print(out)
