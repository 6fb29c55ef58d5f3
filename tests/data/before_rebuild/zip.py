from srwm_rl.agents import IMPALA, PPO

for cls, kw in ((PPO, {"batch_size": 32}), (IMPALA, {"synchronous": True})):
    m = cls(
        "SRWMPolicy",
        "CartPole-v1",
        n_steps=16,
        seed=0,
        policy_kwargs=dict(core_kwargs=dict(hidden_size=8, n_heads=2, n_layers=1, ff_size=8)),
        **kw,
    )
    m.learn(64)
    m.save(f"zip_{cls.__name__.lower()}")
