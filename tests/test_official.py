"""The README's commands for official weights, as they stand there, on files of formula weights in exactly these layouts.

    python -m pytest -m slow tests/test_official.py        the full sizes: DiT-XL/2 and Stable Diffusion's autoencoder, 3 GB
"""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import data
import ddpm
import sample
from dit import SIZES, DiT
from formula import GOLDEN, fill
from text import CLIPTextEncoder
from uvit import UViT
from vae import AutoencoderKL

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMAND = next(line for line in README.splitlines() if line.startswith("python sample.py --ckpt DiT-XL-2-256x256.pt --vae"))
SMALL_VAE = dict(dim=32, multipliers=(1, 2, 4, 4), res_blocks=1)         # f = 8, as Stable Diffusion's


def safetensors(path, tensors):
    """Write tensors as the format says: the header's length, the header, the numbers."""
    header, position = {}, 0
    for name, value in tensors.items():
        header[name] = dict(dtype="F32", shape=list(value.shape), data_offsets=[position, position + value.nbytes])
        position += value.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.numpy().tobytes())


def run_as_written(dit, autoencoder, *more):
    """Lay the two files down under the names in the README, run its command, and return what it drew."""
    torch.save(dit.state_dict(), "DiT-XL-2-256x256.pt")
    safetensors("sd-vae-ft-mse.safetensors", autoencoder.state_dict())
    sample.main([*COMMAND.split("#")[0].split()[2:], "--npz", "drawn.npz", *more])
    with np.load("drawn.npz") as archive:
        return archive["arr_0"], archive["arr_1"]


def expected(dit, autoencoder, steps, i=0, y=207):
    """Image i, by the parts: the noise of (seed 0, i), Meta's process, guidance 4 on class y, Stable Diffusion's scale."""
    diffusion = ddpm.Diffusion(ddpm.linear_betas(), variance="learned")
    x = ddpm.sample(diffusion, dit, (1, 4, *dit.image_size), torch.tensor([y]), "dpm++", steps, cfg_scale=4.0, seeds=[(0, i)])
    with torch.no_grad():
        return data.to_uint8(autoencoder.decode(x / 0.18215))[0].numpy()


def test_metas_files_and_the_autoencoders_are_sampled_by_the_command_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit, autoencoder = fill(DiT(8, 2, 4, 64, 2, heads=1), ("pos_embed",)), fill(AutoencoderKL(**SMALL_VAE))
    images, labels = run_as_written(dit, autoencoder, "--n", "2", "--steps", "2")
    assert labels.tolist() == [207, 360] and images.shape == (2, 64, 64, 3)
    assert abs(images[0].astype(int) - expected(dit, autoencoder, 2)).max() <= 1         # another batch may round otherwise
    assert Path("samples.png").exists()


@pytest.mark.slow
def test_dit_xl_2_and_the_autoencoder_in_full_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit, autoencoder = fill(DiT(32, 2, 4, **SIZES["XL"]), ("pos_embed",)), fill(AutoencoderKL())
    assert sum(value.numel() for value in autoencoder.parameters()) == 83_653_863
    images, labels = run_as_written(dit, autoencoder, "--n", "1", "--steps", "2")
    assert labels.tolist() == [207] and images.shape == (1, 256, 256, 3)
    assert abs(images[0].astype(int) - expected(dit, autoencoder, 2)).max() <= 1


def test_a_released_uvit_of_ms_coco_draws_what_clip_reads_in_its_own_time(tmp_path, monkeypatch):
    """It counts n = t + 1 on Stable Diffusion's schedule, and its latents are scaled by 0.2301."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "clip_tiny", "clip")
    clip = fill(CLIPTextEncoder(vocab=714, length=77, dim=128, depth=1, heads=2, hidden=96))
    safetensors("clip/model.safetensors", clip.state_dict())
    network, autoencoder = fill(UViT(8, 2, 4, dim=64, depth=2, heads=1, context_dim=128)), fill(AutoencoderKL(**SMALL_VAE))
    torch.save(network.state_dict(), "mscoco_uvit_small.pth")
    safetensors("vae.safetensors", autoencoder.state_dict())
    sample.main(["--ckpt", "mscoco_uvit_small.pth", "--vae", "vae.safetensors", "--clip", "clip", "--prompt", "a cat on a table",
                 "--n", "1", "--steps", "2", "--cfg-scale", "2", "--npz", "drawn.npz"])
    _, tokenizer = checkpoint.load_clip("clip")
    diffusion = ddpm.Diffusion(ddpm.scaled_linear_betas(), timesteps=np.arange(1000) + 1)
    with torch.no_grad():
        context, empty = (clip(tokenizer.tokenize([text])) for text in ("a cat on a table", ""))
        x = ddpm.sample(diffusion, network, (1, 4, 8, 8), context, "dpm++", 2, cfg_scale=2.0, y_null=empty[0], seeds=[(0, 0)])
        wanted = data.to_uint8(autoencoder.decode(x / 0.2301)).numpy()
    with np.load("drawn.npz") as archive:
        assert abs(archive["arr_0"].astype(int) - wanted).max() <= 1
        assert "arr_1" not in archive
