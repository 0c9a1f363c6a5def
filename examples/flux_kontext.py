"""FLUX.1 Kontext edits a picture: what the edit changes is computed, all else is kept."""

import torch
from diffusers import FluxKontextPipeline
from PIL import Image

import ras

pipe = FluxKontextPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-Kontext-dev", torch_dtype=torch.bfloat16
)
pipe.to("cuda")

ras.enable(pipe, sample_ratio="edited", speedup=2, preserve=True)
picture = Image.open("photo.png").convert("RGB")
image = pipe(
    image=picture, prompt="make the car red", num_inference_steps=28, guidance_scale=2.5
).images[0]

edited = ras.stats(pipe).edited[0]  # the regions that it has changed
kept = ras.put_back(image, picture.resize(image.size), edited)
kept.save("edited.png")
ras.pictures.region_map(kept, edited).save("regions.png")
print(f"{edited.float().mean():.0%} of the picture edited")
print(ras.stats(pipe))
