"""Wan makes a video; both of Wan 2.2's transformers are enabled by the one call."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import ras

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16)
pipe.to("cuda")

ras.enable(pipe, speedup=2)
frames = pipe(
    "waves against a lighthouse", height=480, width=832, num_frames=81, num_inference_steps=50
).frames[0]

export_to_video(frames, "storm.mp4", fps=16)
ras.pictures.plan_strip(ras.stats(pipe).plan).save("plan.png")
print(ras.stats(pipe))
