"""Calibration and ODLRI compression of Llama-2-7B, with the settings of LLaDA-8B.

python -m launch.compile --config configs/llama_2_7b_odlri.py --topology v5e:4x4 --step calibrate
python -m launch.compile --config configs/llama_2_7b_odlri.py --topology v5e:4x4 --effort -1

By the TPU compiler (docs/tpu.md), calibration on v5e:4x4: 3.59 GB of a chip's 17.2; a batch of 65,536 tokens takes at
least 53 ms a layer. The decomposition of 16 matrices 4096 x 11008 on its 16 chips: 4.58 GB, at least 9.6 s.
"""

from configs import llada_8b_odlri


def get_config():
    config = llada_8b_odlri.get_config()
    config.model.checkpoint = "checkpoints/Llama-2-7b-hf"
    return config
