import gc
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve others
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from pool import Pool  # noqa: E402


def pytest_collection_finish():
    gc.freeze()  # torch's and pytest's million objects are not searched for garbage again and again


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def pool():
    """Processes for gloo groups of 1, 2 and 4: `pool.run(size, function, *arguments)`."""
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Sixteen JPEGs of mixed sizes in two classes, under train/ and test/."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(16):
            folder = root / split / ("cats", "dogs")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
            pixels = rng.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}.jpg")
    return root
