"""Many prompts with Ray Data: each actor enables a pipeline once, on a GPU of its own if any."""

import numpy as np
import ray
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import ras

GPUS = int(torch.cuda.is_available())  # of an actor


class Draw:
    def __init__(self):
        self.pipe = DiffusionPipeline.from_pretrained(
            ras.bundled_model(), text_encoder_3=None, tokenizer_3=None
        ).to("cuda" if GPUS else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        ras.enable(self.pipe, speedup=2)

    def __call__(self, row):
        seed = torch.Generator().manual_seed(row["seed"])
        call = dict(num_inference_steps=12, guidance_scale=4.0, max_sequence_length=0)
        image = self.pipe(row["prompt"], generator=seed, **call).images[0]
        stats = ras.stats(self.pipe)
        return {**row, "image": np.asarray(image), "ceiling": stats.speedup_ceiling}


colours = "red", "green", "blue", "yellow"
rows = [{"prompt": f"a {colour} ring on white", "seed": i} for i, colour in enumerate(colours)]
actors = ray.data.ActorPoolStrategy(size=2)
drawn = ray.data.from_items(rows).map(Draw, num_gpus=GPUS, compute=actors)
for row in sorted(drawn.take_all(), key=lambda row: row["seed"]):
    Image.fromarray(row["image"]).save(f"{row['seed']}.png")
    print(f"{row['seed']}.png", row["prompt"], f"{row['ceiling']:.2f}x")
