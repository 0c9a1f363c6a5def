"""FLUX.1 Fill paints under a mask: its own mask tells which regions partial steps compute."""

import torch
from diffusers import FluxFillPipeline
from PIL import Image

import ras

pipe = FluxFillPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-Fill-dev", torch_dtype=torch.bfloat16
)
pipe.to("cuda")

ras.enable(pipe, speedup=2, preserve=True)  # what is beside the mask stays the picture's
image = pipe(
    "a red car",
    image=Image.open("photo.png").convert("RGB"),
    mask_image=Image.open("mask.png").convert("L"),  # white where it is painted
    num_inference_steps=28,
    guidance_scale=30,
).images[0]

image.save("filled.png")
ras.pictures.region_map(image, ras.stats(pipe).region_counts[0]).save("regions.png")
print(ras.stats(pipe))
