"""Learn a plan from a call that is wanted anyway; later runs, of any prompt, go by it."""

import torch
from diffusers import FluxPipeline

import ras

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.to("cuda")

ras.enable(pipe, speedup=2)
images = ras.learn(  # dense images; four tell more than one
    pipe, "a lighthouse", num_inference_steps=28, num_images_per_prompt=4, file="learnt.json"
).images
images[0].save("lighthouse.png")
print(ras.stats(pipe).learnt)  # how much nearer later runs will be, or that the plan stays

pipe("a ship", num_inference_steps=28).images[0].save("ship.png")
print(ras.stats(pipe))
