"""Search a plan by real runs on a few prompts, once; keep its file, and draw by it."""

import torch
from diffusers import FluxPipeline

import ras

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.to("cuda")

prompts = [  # 8 to 32 like those to come make a better search
    "a lighthouse in a storm",
    "a red fox in the snow",
]
plan = ras.calibrate(
    pipe,
    prompts,
    speedup=2,
    num_inference_steps=20,
    guidance_scale=3.5,
    checkpoint="search.json",  # an interrupted search goes on from there
)
plan.save("2x.json")
ras.pictures.plan_strip(plan).save("2x.png")

ras.enable(pipe, plan="2x.json")
pipe("a ship", num_inference_steps=20, guidance_scale=3.5).images[0].save("ship.png")
print(ras.stats(pipe))
