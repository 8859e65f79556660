r"""VRPO of LLaDA-8B-Instruct, a baseline: a safe answer before a harmful one, an answer before an idle refusal.

    python -m a2d_jax.baseline_rows --rows data/beavertails.jsonl --out data
    python -m a2d_jax.train --config configs/llada_8b_vrpo.py --workdir runs/llada_8b_vrpo \
        --config.model.checkpoint=checkpoints/LLaDA-8B-Instruct

Any file of {"prompt", "chosen", "rejected"} rows will do. Adapter and rows as in configs/llada_8b_a2d.py, so that the
baselines differ in the loss alone; the rate is lower, as preference losses need it. Published (average attack success
over five attacks): 60.2 % -> 21.6 %.
"""

from configs import llada_8b_a2d


def get_config():
    config = llada_8b_a2d.get_config()
    config.data.files = ("data/preferences.jsonl",)
    config.preference = {"beta": 0.2, "num_samples": 8}
    config.lora.dropout = 0.0  # noise that policy and reference would not share
    # Eight pairs, each with 16 masked rows in the policy and in the reference, a pair on a chip at a time.
    config.batch_size = 16
    config.num_epochs = 1.0
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup_steps = 20
    return config
