"""Stable Diffusion 3.5 paints a masked part of a picture anew, and computes it alone."""

import torch
from diffusers import StableDiffusion3InpaintPipeline
from PIL import Image

import ras

pipe = StableDiffusion3InpaintPipeline.from_pretrained(
    "stabilityai/stable-diffusion-3.5-medium", torch_dtype=torch.bfloat16
)
pipe.to("cuda")

ras.enable(pipe, speedup=2, mask_margin=1)  # the pipeline's mask is used; mask= takes another
image = pipe(
    "a lighthouse in a storm",
    image=Image.open("photo.png").convert("RGB"),
    mask_image=Image.open("mask.png").convert("L"),
    strength=1.0,
    num_inference_steps=28,
).images[0]

image.save("painted.png")
ras.pictures.heat_map(ras.stats(pipe).region_counts[0], image.size).save("regions.png")
print(ras.stats(pipe))
