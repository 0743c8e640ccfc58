__version__ = "0.1.0"

# Raised whenever a bit of any implementation's noise changes: a residual is restored by the noise
# that filled it. kNoiseVersion in csrc/philox.h is the same.
NOISE_VERSION = 1
