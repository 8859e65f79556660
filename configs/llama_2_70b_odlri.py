"""Calibration and ODLRI compression of Llama-2-70B, with the settings of LLaDA-8B.

python -m launch.compile --config configs/llama_2_70b_odlri.py --topology v5p:2x2x4 --step calibrate
python -m launch.compile --config configs/llama_2_70b_odlri.py --topology v5p:2x2x4 --effort -1

By the TPU compiler (docs/tpu.md), calibration on v5p:2x2x4: 14.3 GB of a chip's 102; a batch of 65,536 tokens takes at
least 0.13 s a layer. The decomposition of 16 matrices 8192 x 28672 on its 16 chips: 27.3 GB, at least 39 s; of the
whole model at least 6.1 minutes, derived there.
"""

from configs import llada_8b_odlri


def get_config():
    config = llada_8b_odlri.get_config()
    config.model.checkpoint = "checkpoints/Llama-2-70b-hf"
    return config
