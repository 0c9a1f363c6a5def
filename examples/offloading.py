"""Little memory: parts wait on the CPU, and keys and values have a limit."""

import torch
from diffusers import FluxPipeline

import ras

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()

ras.enable(pipe, sample_ratio=0.5, max_cache_bytes=4 * 2**30)
print(f"{ras.plan(pipe, 28).cache_bytes:,} bytes of keys and values, if there is room")

image = pipe("a lighthouse in a storm", num_inference_steps=28, guidance_scale=3.5).images[0]
image.save("lighthouse.png")
print(f"{ras.stats(pipe).cache_bytes:,} bytes were kept; they are freed by now")
