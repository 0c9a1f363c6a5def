"""Lumina-Next beside its dense image: how much they differ, and where."""

import torch
from diffusers import LuminaPipeline

import ras

pipe = LuminaPipeline.from_pretrained(
    "Alpha-VLLM/Lumina-Next-SFT-diffusers", torch_dtype=torch.bfloat16
)
pipe.to("cuda")


def draw():
    noise = torch.Generator().manual_seed(0)
    return pipe("a lighthouse in a storm", num_inference_steps=30, generator=noise).images[0]


dense = draw()
with ras.enabled(pipe, speedup=1.75):
    image = draw()
    print(ras.stats(pipe))

image.save("lighthouse.png")
ras.pictures.difference_map(dense, image).save("difference.png")
print(f"PSNR {ras.pictures.psnr(dense, image):.1f} dB to the dense image")
