"""`kernels benchmark FOLDER`: times operators, and compares their results with plain PyTorch."""

import torch
from kernels.benchmark import Benchmark


class D2vBenchmark(Benchmark):
    """The moving average of the parameters, the targets, and the gather of visible tokens."""

    seed = 0

    def setup(self) -> None:
        """Shapes of data2vec 2.0's base image model."""
        self.layers = [torch.randn(16, 196, 768, device=self.device) for _ in range(10)]
        self.keep = torch.rand(128, 196, device=self.device).argsort(dim=1)[:, :39].contiguous()

    def benchmark_average_layers(self) -> None:
        """Ten layers, instance norm."""
        self.out = self.kernel.average_layers(self.layers, norm="instance")

    def verify_average_layers(self) -> torch.Tensor:
        """The definition."""
        normal = [torch.nn.functional.instance_norm(x.mT).mT for x in self.layers]
        return torch.stack(normal).mean(0)

    def benchmark_gather_tokens(self) -> None:
        """39 of 196 tokens, eight masks a sample."""
        self.out = self.kernel.gather_tokens(self.layers[0], self.keep, clones=8)

    def verify_gather_tokens(self) -> torch.Tensor:
        """The definition."""
        x = self.layers[0].repeat_interleave(8, dim=0)
        return x.gather(1, self.keep[:, :, None].expand(-1, -1, 768))
