"""What every test stands on: one thread, and an image cache of its own."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Runs train on one thread each; so do tests, also beside a busy neighbour.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Decoded images go to a folder of this session, never to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("RESNEXT_ABLATE_CACHE")
    os.environ["RESNEXT_ABLATE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["RESNEXT_ABLATE_CACHE"]
    else:
        os.environ["RESNEXT_ABLATE_CACHE"] = before
    shutil.rmtree(folder, ignore_errors=True)
