"""Files: written whole or not at all, cached in one place, downloaded once and checked."""
import hashlib
import http.client
import os
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


def cache_folder(cache=None):
    """The folder of caches and downloads, made if it does not exist: `cache`, or the user's."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-transformers"
    folder = Path(cache) if cache else user
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def atomic_file(path):
    """A binary file to write: under a temporary name beside the target, flushed and renamed when all is well.

    A reader never sees half a file; an error, a full disk or a kill leaves the old one whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url, sha256, folder, what):
    """Fetch a file once into a folder -> its path. OSError if it cannot be had, or its SHA-256 differs (it is not kept)."""
    path = Path(folder) / url.rsplit("/", 1)[-1]
    if path.exists():
        found = sha256_of(path)
        if found != sha256:
            raise OSError(f"{path} is not {what}: its SHA-256 is {found}, not {sha256}; delete it")
        return path
    digest = hashlib.sha256()
    try:
        with atomic_file(path) as file, urllib.request.urlopen(url, timeout=30) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise OSError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")
    except (OSError, http.client.HTTPException) as error:                # urllib's own errors are OSErrors
        raise OSError(f"cannot download {what} ({str(error).strip()}): fetch {url} yourself and put it at {path}") from None
    return path
