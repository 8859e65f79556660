r"""Calibration and ODLRI compression of LLaDA-8B-Instruct: 2-bit Q on the E8 lattice, 16-bit factors of rank 256.

python -m launch.compile --config configs/llada_8b_odlri.py --topology v5e:4x4 --step calibrate
python -m launch.compile --config configs/llada_8b_odlri.py --topology v5e:4x4 --effort -1

By the TPU compiler (docs/tpu.md), calibration on v5e:4x4: 1.74 GB of a chip's 17.2, 1.01 of it arguments; a batch of
65,536 tokens takes at least 61 ms a layer. The decomposition of 16 matrices 4096 x 12288 on its 16 chips:
5.24 GB, at least 11 s.

On a slice itself, with the same settings:

    python -m odlri_jax.calibrate --checkpoint checkpoints/LLaDA-8B-Instruct --text FILE --out moments \
        --context_length 4096 --batch_size 16 --layers_per_group 1 --dtype bfloat16 --mesh 1,-1,1
    python -m odlri_jax.compress --checkpoint checkpoints/LLaDA-8B-Instruct --calibration moments --out packed \
        --rank 256 --init odlri
"""

from launch.settings import compress_config


def get_config():
    config = compress_config("checkpoints/LLaDA-8B-Instruct", batch_size=16, length=4096, rank=256, init="odlri")
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config
