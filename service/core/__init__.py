"""The pure core: no clock, environment, network or Redis; shared by serving and training."""
