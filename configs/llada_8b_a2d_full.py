r"""A2D alignment of LLaDA-8B-Instruct, every weight: float32 master weights, bfloat16 compute.

    python -m a2d_jax.train --config configs/llada_8b_a2d_full.py --workdir runs/llada_8b_a2d_full \
        --config.model.checkpoint=checkpoints/LLaDA-8B-Instruct --config.data.files="('data/beavertails.jsonl',)"

Weights, gradients and AdamW moments take 16 bytes a parameter, about 128 GB before activations, split over the chips.
By the TPU compiler (docs/tpu.md), memory of a chip and the most of its peak that a step can reach:

    v5e:4x4    16 rows     --config.mesh.fsdp=1 --config.mesh.tensor=16     9.83 of 17.2 GB   57 %
    v5e:8x8    1024 rows   --config.batch_size=1024                         4.94 of 17.2 GB   73 %
    v5e:8x8    8192 rows   --config.batch_size=8192                        14.10 of 17.2 GB   81 %
    v5p:2x2x4  14336 rows  --config.batch_size=14336                        91.1 of 102 GB    81 %

With 16 rows on v5e:4x4 --config.remat=dots needs a fifth less arithmetic, and 1.7 GB more.
"""

from configs import llada_8b_a2d


def get_config():
    config = llada_8b_a2d.get_config()
    config.lora = None
    config.dtypes.param = "float32"

    # An adapter's rate would be too high for whole weights.
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.num_epochs = 3.0
    return config
