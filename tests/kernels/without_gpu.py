"""Triton's driver of a Hopper GPU that is not there: kernels are compiled for it, and launches are counted.

Prints, as JSON, what `compile_ahead` compiled for a forward and backward, and what these then still had to.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_poolformer import PoolFormerConfig, PoolFormerModel, backends
from hf_poolformer.kernels import ahead, channel_mlp, pool_mixer, statistics  # noqa: F401 registers the operations


launched: list[str] = []
compiled: list[str] = []


class Hopper:
    """What Triton asks of a driver, as far as it compiles and launches."""

    binary_ext = "cubin"

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        @staticmethod
        def load_binary(name: str, *arguments) -> tuple[int, ...]:
            return 1, 1, 128, 0, 1024  # module, function, registers, spills, most threads

        @staticmethod
        def unload_module(module: int) -> None: ...

    def launcher_cls(self, source, metadata):
        return lambda *arguments, **options: launched.append(source.fn.__name__)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    driver.set_active(Hopper())
    backends._why_no_kernels = lambda device, index: None
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **rest: compiled.append(fn.name)
    torch.manual_seed(0)
    config = PoolFormerConfig(depths=(2, 1, 1, 1), hidden_sizes=(16,) * 4, drop_path_rate=0.1, kernels="triton")
    model = PoolFormerModel(config).train()
    images, state = torch.randn(2, 3, 64, 64), torch.get_rng_state()

    walk, found = ahead.compile_ahead, {}

    def watched(*arguments):
        found["collected"] = walk(*arguments)
        found["launched ahead"], found["compiled ahead"] = list(launched), list(compiled)
        found["random numbers"] = not torch.equal(torch.get_rng_state(), state)
        found["gradients"] = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        return found["collected"]

    ahead.compile_ahead = watched
    model(images).last_hidden_state.sum().backward()
    found["compiled later"], found["launched later"] = compiled[len(found["compiled ahead"]) :], len(launched)
    ahead.compile_ahead = walk
    found["compiled in two threads"], found["collected in two threads"] = infer_in_two_threads()
    print(json.dumps(found))


def infer_in_two_threads() -> tuple[int, int]:
    """Two models at once, some of whose kernels are the same: how many were compiled, and how many of them ahead."""
    models = [
        PoolFormerModel(PoolFormerConfig(depths=(1,) * 4, hidden_sizes=(size,) * 4, kernels="triton")).eval()
        for size in (24, 40)
    ]
    begun, counts, rehearse = len(compiled), [], ahead.rehearse

    def watched(*arguments):
        counts.append(rehearse(*arguments))
        return counts[-1]

    def infer(model: PoolFormerModel) -> None:
        with torch.no_grad():
            model(torch.randn(2, 3, 64, 64))

    ahead.rehearse = watched
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(infer, models))
    assert triton.knobs.runtime.jit_cache_hook is None
    return len(compiled) - begun, sum(counts)


if __name__ == "__main__":
    main()
