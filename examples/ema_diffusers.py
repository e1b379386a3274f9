"""diffusers' moving average in one pass: `python examples/ema_diffusers.py`."""

import diffusers.training_utils
import torch

from d2v_kernels import update_ema_


class EMAModel(diffusers.training_utils.EMAModel):
    """For diffusers' `EMAModel`, with its arguments, schedule and state; parameters that are not trained are copied."""

    @torch.no_grad()
    def step(self, parameters):
        pairs = list(zip(self.shadow_params, parameters, strict=True))
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        trained = [(average, p) for average, p in pairs if p.requires_grad]
        update_ema_([average for average, _ in trained], [p for _, p in trained], self.cur_decay_value)
        for average, p in pairs:
            if not p.requires_grad:
                average.copy_(p)


if __name__ == "__main__":
    model = torch.nn.Linear(4, 4)
    ema = EMAModel(model.parameters(), decay=0.9)
    torch.nn.init.normal_(model.weight)
    ema.step(model.parameters())
    print(ema.shadow_params[0])
