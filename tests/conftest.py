"""Settings that turn silent mistakes into errors, and the fixtures every test may use."""

from __future__ import annotations

import os
import pathlib

# Four host devices, so that sharding is tested on any machine. Set before jax is imported.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Examples must not depend on the day, and a compilation inside one is no reason to fail it.
settings.register_profile("qjax", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("qjax")


def shared_data_dir() -> pathlib.Path | None:
    """The folder of real models and texts that is not part of the repository, if there is one."""
    given = os.environ.get("QJAX_SHARED_DATA")
    checkout = pathlib.Path(__file__).resolve().parent.parent
    folder = pathlib.Path(given) if given else checkout.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real models and texts; the test is skipped where they are absent."""
    folder = shared_data_dir()
    if folder is None:
        pytest.skip("needs the shared model data: set QJAX_SHARED_DATA to its folder")
    return folder


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that differ from test to test and are the same in every run.

    NumPy's, because ``jax.random`` compiles a program for every new shape.
    """
    return np.random.default_rng(sum(request.node.name.encode()))


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key that differs from test to test and is the same in every run."""
    return jax.random.key(sum(request.node.name.encode()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA Hopper GPU"))
