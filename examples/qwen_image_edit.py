"""Qwen-Image-Edit with regions: partial steps compute those that the edit changes."""

import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

import ras

pipe = QwenImageEditPipeline.from_pretrained("Qwen/Qwen-Image-Edit", torch_dtype=torch.bfloat16)
pipe.to("cuda")

ras.enable(pipe, sample_ratio="edited", speedup=2)
image = pipe(
    image=Image.open("photo.png").convert("RGB"),
    prompt="make the car red",
    negative_prompt=" ",
    true_cfg_scale=4.0,  # two calls of the transformer, each with caches of its own
    num_inference_steps=28,
).images[0]
image.save("edited.png")

stats = ras.stats(pipe)
for step, kind in enumerate(stats.steps):
    print(f"step {step:2}  {kind:8} {stats.walked[step, 0].float().mean():4.0%} of the regions")
ras.pictures.region_map(image, stats.region_counts[0]).save("regions.png")
