"""Compiled blocks: one graph for dense steps and one for partial ones, whatever the prompt."""

import torch
from diffusers import FluxPipeline

import ras

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.to("cuda")

ras.compile_repeated_blocks(pipe, fullgraph=True)  # the same before or after ras.enable
ras.enable(pipe, sample_ratio=0.5)

prompts = {"lighthouse.png": "a lighthouse in a storm", "ship.png": "a ship"}
for file, prompt in prompts.items():  # the first call compiles
    pipe(prompt, num_inference_steps=28, guidance_scale=3.5).images[0].save(file)
print(ras.stats(pipe))
