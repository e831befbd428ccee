"""Which peers there are, and the Python that can import each.

diffusers is in the extra `bench`, and webdataset among the project's own. The others declare dependencies that the
project has no use for (guided-diffusion-sdk wants blobfile and its chain, to read files from the cloud;
mosaicml-streaming wants numpy below 2.2, transformers and torchvision), so they live in an environment of their own,
bench/.venv-peers, made here from bench/peers.txt without dependencies. It sees torch and the rest through a .pth file
that names the site-packages of the Python running this: one torch on disk, and the very same kernels on every side of a
comparison. Its own packages come first, so nothing in there can change the project's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE / ".venv-peers"
REQUIREMENTS = HERE / "peers.txt"

# Worker name (bench/worker.py) -> module that must be found, distribution whose version is reported.
PEERS = {
    "diffusers": ("diffusers", "diffusers"),
    "guided-diffusion": ("guided_diffusion", "guided-diffusion-sdk"),
    "monai": ("monai", "monai"),
}

# The same for loaders (bench/loaders.py).
LOADERS = {
    "webdataset": ("webdataset", "webdataset"),
    "mosaicml-streaming": ("streaming", "mosaicml-streaming"),
    "litdata": ("litdata", "litdata"),
}

NOT_RUN = {
    "denoising-diffusion-pytorch 2.3.4": "imports torchvision at the top. torchvision 0.28.0, the release for torch "
    "2.13.0, does not import beside the CPU build of torch here (`RuntimeError: operator torchvision::nms does not "
    "exist`; the same error then stops diffusers, so torchvision must stay out), and with a stub in its place it would "
    "not be the peer. Not tried: a whole second torch, built for CUDA.",
    "improved-diffusion": "not found on PyPI but as a fork for microscopy (improved-diffusion-for-smlm), not run: "
    "guided-diffusion is its successor, and runs.",
    "k-diffusion 0.1.1.post1": "not run: it imports torchvision, as above; its U-Nets are other architectures too.",
    "latent-diffusion": "CompVis's is not on PyPI; the package of that name calls itself a minimal example.",
}


def python_for(peer: str) -> str:
    """A Python that can import the peer: this one, or that of bench/.venv-peers, which is made when it is missing.

    Raises:
        RuntimeError: neither can, or the environment can't be made.
    """
    module = (PEERS | LOADERS)[peer][0]
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    try:
        python = make_environment()
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{ENVIRONMENT.name} can't be made: {' '.join(error.cmd)}") from error
    found = subprocess.run(
        [python, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"]
    )
    if found.returncode:
        raise RuntimeError(f"{module} is neither beside the project (extra `bench`) nor in {ENVIRONMENT.name}")
    return python


def make_environment() -> str:
    """Make bench/.venv-peers unless it matches peers.txt and this Python; returns its interpreter."""
    shared = sysconfig.get_paths()["purelib"]
    key = hashlib.sha256(f"{sys.version}\n{shared}\n{REQUIREMENTS.read_text()}".encode()).hexdigest()
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".made-from"
    if not (stamp.exists() and stamp.read_text() == key):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        own = ENVIRONMENT / Path(sysconfig.get_paths()["purelib"]).relative_to(sys.prefix)
        (own / "project.pth").write_text(f"{shared}\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(REQUIREMENTS)]
        subprocess.run(install, check=True)
        stamp.write_text(key)
    return str(python)
