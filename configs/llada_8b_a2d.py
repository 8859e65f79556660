r"""A2D alignment of LLaDA-8B-Instruct as in the paper: a LoRA adapter on 128-token BeaverTails rows, ten epochs.

    python -m a2d_jax.train --config configs/llada_8b_a2d.py --workdir runs/llada_8b_a2d \
        --config.model.checkpoint=checkpoints/LLaDA-8B-Instruct --config.data.files="('data/beavertails.jsonl',)"

LLaDA-1.5: name its folder instead. Published result (HarmBench, average attack success over five attacks): 60.2 % ->
6.8 %, with DIJA 82.9 % -> 1.3 %.

By the TPU compiler (docs/tpu.md), on v5e:2x4: 3.84 GB of a chip's 17.2; on v6e:2x4: 3.55 GB of 34.4.
With 16 rows on 8 chips the gathering of weights takes five times longer than arithmetic: see there for a better mesh.
"""

from a2d_jax.settings import default_config


def get_config():
    config = default_config()
    config.model.checkpoint = "checkpoints/LLaDA-8B-Instruct"
    # The family's default targets: q, k, v, gate, up, down and, as in the release, the output head; o_proj stays.
    config.lora = {"rank": 32, "alpha": 64.0, "dropout": 0.05, "targets": ()}
    config.dtypes.param = config.dtypes.compute = "bfloat16"
    config.remat = "full"

    config.data.files = ("data/beavertails.jsonl",)
    config.data.row_length = 128
    config.data.buckets = (64, 96, 128)
    config.data.on_long_prompt = "drop"
    config.batch_size = 16
    config.num_epochs = 10.0

    config.optimizer.learning_rate = 5e-5
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule = "constant"
    config.optimizer.clip_norm = 1.0  # the default of the trainer that the release used

    config.mesh.data, config.mesh.fsdp = 1, -1
    config.checkpoint_every = 500
    return config
