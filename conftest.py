"""Settings of every test; its place puts the repository's root on sys.path."""
import torch
from hypothesis import settings

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)      # repeatable, whatever the machine's load
settings.load_profile("ci")
torch.set_num_threads(2)
