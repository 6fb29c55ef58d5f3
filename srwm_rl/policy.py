"""The former path of `srwm_rl.nn.policy.SRWMPolicy`, which SB3 zips name."""

from srwm_rl.nn.policy import SRWMPolicy as SRWMPolicy
