"""The network: layers, encoders, cores, action distributions and the SB3 policy."""
