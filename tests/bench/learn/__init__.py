"""What a job of each method costs and comes to, on the same devices' data: `make bench NAME=learn`.

Real services, the edge client's own code and llama.cpp, in one process and in virtual time; two
rows, `head` and `ceiling`, are gradients in torch.
"""

from tests.bench.learn.report import figures

__all__ = ["figures"]
