"""Kernels behind `hf_poolformer.backends`, registered with torch.library as `torch.ops.hf_poolformer.*` but for those
of token_norm.py, which run outside of graphs only.

Importing a module registers its operations; only `backends.py` imports them, and only when they may run. This package
imports nothing of the others: it is also published alone (hub/kernel_repository.py), for models that carry their code
to where hf_poolformer is missing. There it has another name, and so has its namespace in `torch.ops`. All kernels
read and write NHWC memory: tensors are logically (B, C, H, W) and contiguous in `torch.channels_last`. Accumulation is
float32; reductions are in a fixed order, so that results do not change from run to run.

cpu.py          both operations with oneDNN; the others need Triton, and without it raise ImportError
statistics.py   mean and variance of each sample or token
patch_embedding.py  a convolution of few channels; the bias of any other
pool_mixer.py   res_scale * x + mask * scale * rstd * (pool(x) - x)
channel_mlp.py  res_scale * x + mask * layer_scale * (W2 act(W1 norm(x) + b1) + b2)
mlp_forward.py, mlp_backward.py, mlp_parameters.py  its forward, its backward, gradients of its parameters
mlp_parts.py    what these share
token_norm.py   LayerNorm over channels, and res_scale * x + mask * layer_scale * branch with it
separable_conv.py  res_scale * x + mask * layer_scale * (W2 D act(W1 norm(x))), D a depthwise convolution
depthwise.py    D act(z), and its backward
products.py     products of tokens and weights; that which ends a branch, with scales and shortcut
folding.py      weights as products take them
activations.py  activations and their derivatives
parts.py        what kernels of several modules are made of
registration.py  the same under torch.ops.hf_poolformer, for graphs, and how eager code avoids that
launch.py       choice of tiles, precision of products, devices
tiles.py        which tile is the best known one
ahead.py        compilation of all that a model needs, before its first step
recordings.py   launches that are recorded once and repeated
inference.py    all branches of a stage without gradients, recorded
stages.py       the same as one operation, for graphs
training.py     a stage without attention as one function of autograd, recorded
layers.py       what transformers' `use_kernels` takes, where this package is published alone
"""

from contextvars import ContextVar


# What backends.py (which may be a copy that travelled with a checkpoint) expects of these operations. Raise it when a
# schema changes: a copy that knows another number takes the reference instead of failing.
INTERFACE = 3

# In `torch.ops`: `hf_poolformer`, or what the `kernels` library calls the package that it has loaded.
NAMESPACE = __name__.partition(".")[0]

# Whether a forward is a rehearsal for a CUDA graph (`hf_poolformer.graphed`), which is to do what the graph will.
GRAPHING: ContextVar[bool] = ContextVar("graphing", default=False)

__all__ = ["GRAPHING", "INTERFACE", "NAMESPACE"]
