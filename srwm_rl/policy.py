"""The policy's former path, which SB3 zips name; it lives in `srwm_rl.nn.policy`."""

from srwm_rl.nn.policy import SRWMPolicy as SRWMPolicy
