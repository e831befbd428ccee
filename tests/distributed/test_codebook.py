"""The codebook of a quantised condition over two ranks: gradients of one, and equal resets."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.projects import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROGRAM = """
import sys
import torch
from ddpm_core import Conditions, QuantizedEmbedding, p_losses, register_schedule, timestep_embedding
from pipeline.machine import load_machine
from pipeline.runtime.topology import start_topology

class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedder = Conditions({"angle": QuantizedEmbedding(8, 2, 16, encoder=torch.nn.Linear(1, 2))})
        self.network = torch.nn.Linear(18, 2)
    def forward(self, x_t, t, condition):
        return self.network(torch.cat((x_t, timestep_embedding(t, 16) + self.embedder(condition, len(x_t))), dim=1))

torch.manual_seed(0)
network, schedule = Denoiser(), register_schedule(beta_schedule="cosine", timesteps=50)
query, x0, noise, t = torch.rand(12, 1), torch.randn(12, 2), torch.randn(12, 2), torch.arange(12) * 4
query[::4] = torch.nan
with start_topology(load_machine({"PIPELINE_DEVICE": "cpu"})) as topology:
    wrapped = topology.wrap(network)
    for step in range(2):  # DDP complains in the second if a weight had no gradient in the first
        network.zero_grad()
        *first, last = torch.arange(12)[topology.slice_of(12)].split(4)
        for part in first:
            with topology.no_sync(wrapped):
                told = {"angle": query[part]}
                loss = p_losses(wrapped, schedule, x0[part], t[part], noise[part], told).loss
                (loss.sum() * topology.world_size / 12).backward()
        told = {"angle": query[last]}
        loss = p_losses(wrapped, schedule, x0[last], t[last], noise[last], told).loss
        (loss.sum() * topology.world_size / 12).backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
    embedding, u = network.embedder.embedders["angle"], torch.rand(12, generator=torch.Generator().manual_seed(1))
    embedding.reset_dead_codes(query, u)
    book = embedding.codebook.detach()
    torch.save({"gradient": gradient, "book": book}, f"{sys.argv[1]}/{topology.world_size}-{topology.rank}.pt")
"""


def test_two_ranks_have_the_gradient_and_the_codes_of_one(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
                              timeout=120, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for rank in two:
        torch.testing.assert_close(rank["gradient"], one["gradient"])
        assert torch.equal(rank["book"], one["book"])
