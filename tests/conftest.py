"""Before JAX is imported: eight virtual CPU devices for the mesh tests, quick compilation, a cache of compiled code.

Single-device tests run on the first of the eight. Tiny programs spend their time in the compiler, not in the compiled
code, so its optimiser is off, and so are the fusions whose code it generates by MLIR, which took 40 % of the suite's
time. Flags of the environment come last and win; tests marked `default_compiler` need the fusions, see the Makefile.
"""

import os
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads wait by spinning, and the cores are shared
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # the partitioner's notes on shapes this small

import jax  # noqa: E402  (after the environment that it reads)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the reference outputs; its README says what each holds."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Each compiled program holds memory maps; a process that keeps those of the whole suite runs out of them."""
    yield
    jax.clear_caches()
