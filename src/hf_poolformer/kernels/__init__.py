"""Triton kernels behind `hf_poolformer.ops`, registered with torch.library as `torch.ops.hf_poolformer.*`.

Importing this package needs Triton and registers the operations; without Triton it raises ImportError. Only `ops.py`
imports it, and only when kernels may run. All kernels read and write NHWC memory: tensors are logically (B, C, H, W)
and contiguous in `torch.channels_last`. Accumulation is float32; reductions are in two steps without atomics, so that
results do not change from run to run.

statistics.py   mean and variance of each sample
pool_mixer.py   res_scale * x + mask * scale * rstd * (pool(x) - x)
channel_mlp.py  res_scale * x + mask * layer_scale * (W2 act(W1 norm(x) + b1) + b2)
launch.py       choice of tiles, precision of products, devices
"""

from . import channel_mlp, pool_mixer, statistics


# What ops.py (which may be a copy that travelled with a checkpoint) expects of these operations. Raise it whenever a
# schema below changes: a copy that knows another number takes the reference instead of failing.
INTERFACE = 1

__all__ = ["INTERFACE", "channel_mlp", "pool_mixer", "statistics"]
