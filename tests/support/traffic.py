"""What goes over the wire, and what is multiplied."""

from collections import Counter
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


class Traffic(TorchDispatchMode):
    """Counts collectives, by name, and the bytes that this rank gets from others, in a block."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if space in ("c10d", "_c10d_functional"):
            self.calls[name] += 1
            self.bytes += self.received(name, args)
        return output

    def received(self, name, args):
        rank, output = dist.get_rank(), args[0]
        if name == "alltoall_base_":
            counts = args[3]
            return output.nbytes * (sum(counts) - counts[rank]) // max(sum(counts), 1)
        if name == "_allgather_base_":
            return output.nbytes - args[1].nbytes
        if name == "broadcast_":
            return sum(tensor.nbytes for tensor in output) if rank else 0
        raise AssertionError(f"how many bytes does {name} get?")


def of_calls(transformer, per_call):
    """Put into `per_call` collectives, bytes and its blocks' FLOPs of each call of a transformer.

    Return what ends it.
    """
    stack = ExitStack()
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    on_cpu = {attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}

    def begin(module, args, kwargs):
        flops = FlopCounterMode(display=False, custom_mapping=on_cpu)
        per_call.append((stack.enter_context(Traffic()), stack.enter_context(flops)))

    def end(module, args, output):
        stack.close()
        traffic, flops = per_call.pop()
        found = flops.get_flop_counts().items()
        blocks = (sum(counts.values()) for name, counts in found if name.endswith("Block"))
        per_call.append((traffic.calls, traffic.bytes, sum(blocks)))

    handles = [
        transformer.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
        transformer.register_forward_hook(end, always_call=True),
    ]
    return lambda: [handle.remove() for handle in handles]
