"""Settings of every test; its place puts the repository's root on sys.path."""
import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)      # repeatable, whatever the machine's load
settings.load_profile("ci")
torch.set_num_threads(1)                           # on a busy machine, threads that wait for each other cost more than they bring
os.environ["OMP_NUM_THREADS"] = "1"                # also in the processes that tests start


def pytest_configure(config):
    """Hide the GPU from the tests and the processes that they start, unless the file of those that need one is asked for."""
    if not any("test_gpu" in path for path in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: python -m pytest tests/test_gpu.py"))


@pytest.fixture(scope="session", autouse=True)
def fake_cuda(request):
    """The run that test_fake_cuda.py judges, see `begun` there: it begins before the first test; None if that file is left out."""
    module = next((item.module for item in request.session.items if item.path.name == "test_fake_cuda.py"), None)
    if module is None:
        yield
        return
    with module.begun(request.config.cache) as run:
        yield run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """run.pt of a DiT trained for a few steps on the digits, four tokens an image; nudged, so that noise and class show."""
    import checkpoint
    import train
    out = tmp_path_factory.mktemp("run") / "run.pt"
    train.main(["--size", "Ti/16", "--steps", "4", "--batch-size", "8", "--device", "cpu", "--out", str(out)])
    run, generator = checkpoint.load(out), torch.Generator().manual_seed(0)
    for value in run.ema.values():
        value += 0.05 * torch.randn(value.shape, generator=generator)
    checkpoint.save(out, run)
    return out


@pytest.fixture
def two_threads(monkeypatch):
    """PyTorch with two threads, whatever the tests have otherwise, of which each takes two images at least."""
    import cli
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(cli, "LEAST", 2)
    yield
    torch.set_num_threads(before)
