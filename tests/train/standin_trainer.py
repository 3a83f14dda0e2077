"""A trainer of the structure of Seed-VC's ``train.py``, for what the how-to changes in it; its saving is as careless.

It is read as text, changed, and run as a script; what it learns from depends on the step alone.
"""

import argparse
import glob
import os
import shutil
import signal

import torch
import yaml

from seedvc_train.model import build_model
from seedvc_train.optim import make_optimizers, make_schedulers


class Optimizers:
    def __init__(self, model):
        self.optimizers = make_optimizers(model, 1e-3)
        self.schedulers = make_schedulers(self.optimizers)

    def state_dict(self):
        return [(key, optimizer.state_dict()) for key, optimizer in self.optimizers.items()]

    def scheduler_state_dict(self):
        return [(key, scheduler.state_dict()) for key, scheduler in self.schedulers.items()]


def load_custom_model_from_hf(*names):
    raise OSError(f"no network in tests: {names}")


def load_checkpoint(model, optimizer, path):
    for key, tensors in torch.load(path)["net"].items():
        model[key].load_state_dict(tensors)


class Trainer:
    def __init__(self, config_path, pretrained_ckpt_path, run_name, steps, save_interval, max_epochs):
        with open(config_path) as file:
            config = yaml.safe_load(file)
        self.log_dir = os.path.join(config["log_dir"], run_name)
        os.makedirs(self.log_dir, exist_ok=True)
        shutil.copyfile(config_path, os.path.join(self.log_dir, os.path.basename(config_path)))
        self.max_steps, self.n_epochs, self.save_interval = steps, max_epochs, save_interval
        self.train_dataloader = range(7)
        torch.manual_seed(0)
        self.model = build_model(config["model_params"])
        self.optimizer = Optimizers(self.model)
        if pretrained_ckpt_path is None:
            available = glob.glob(os.path.join(self.log_dir, "DiT_epoch_*_step_*.pth"))
            latest = max(available, key=lambda name: int(name.split("_")[-1].split(".")[0]), default="")
        else:
            latest = pretrained_ckpt_path
        if latest:
            load_checkpoint(self.model, self.optimizer, latest)
        self.epoch, self.iters = 0, 0

    def train_one_step(self, batch):
        if os.environ.get("KILLED_AT") == str(self.iters):
            os.kill(os.getpid(), signal.SIGKILL)
        torch.manual_seed(self.iters)
        lengths = torch.tensor([12, 9])
        cond = self.model["length_regulator"](torch.randn(2, 10, 24), ylens=lengths)
        loss = self.model["cfm"].loss(torch.randn(2, 20, 12), lengths, torch.tensor([3, 0]), cond, torch.randn(2, 16))
        self.model.zero_grad()
        loss.backward()
        for key, optimizer in self.optimizer.optimizers.items():
            optimizer.step()
            self.optimizer.schedulers[key].step()
        return loss.item()

    def train_one_epoch(self):
        for batch in self.train_dataloader:
            loss = self.train_one_step(batch)
            self.ema_loss = self.ema_loss * 0.99 + loss * 0.01 if self.iters > 0 else loss
            self.iters += 1

            if self.iters >= self.max_steps:
                break

            if self.iters % self.save_interval == 0:
                net = {key: module.state_dict() for key, module in self.model.items()}
                torch.save(
                    {"net": net}, os.path.join(self.log_dir, f"DiT_epoch_{self.epoch:05d}_step_{self.iters:05d}.pth")
                )

    def train(self):
        self.ema_loss = 0
        self.loss_smoothing_rate = 0.99
        for epoch in range(self.n_epochs):
            self.epoch = epoch
            self.train_one_epoch()
            if self.iters >= self.max_steps:
                break
        net = {key: module.state_dict() for key, module in self.model.items()}
        torch.save({"net": net}, os.path.join(self.log_dir, "ft_model.pth"))


def main(args):
    Trainer(args.config, args.pretrained_ckpt, args.run_name, args.max_steps, args.save_every, args.max_epochs).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--pretrained-ckpt")
    parser.add_argument("--run-name")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--max-epochs", type=int, default=1000)
    main(parser.parse_args())
